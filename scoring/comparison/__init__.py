"""Several predictions of the same images against each other: tables, intervals, a report."""
