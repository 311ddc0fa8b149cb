"""The parts behind train.py: configuration errors, run directories, resume and signals."""
