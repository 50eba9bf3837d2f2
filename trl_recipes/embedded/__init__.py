"""The embedded model and task: a small language model and word problems that run on any laptop."""
