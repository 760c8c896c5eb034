"""The jobs that start from a trained checkpoint. Each module is imported by the script that needs it."""
