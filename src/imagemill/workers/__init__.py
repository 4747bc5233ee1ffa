"""Who runs the pipeline, and where: the launcher, its protocol, worker processes, machines."""
