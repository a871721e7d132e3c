"""One short file per MLproject entry point: parse, wire, call."""
