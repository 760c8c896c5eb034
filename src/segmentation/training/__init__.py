"""What makes a training run a run: its command line, its folder, its loggers, its end on a signal."""
