"""A page to look at the images of a job, served on this machine alone."""
