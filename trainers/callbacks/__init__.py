"""Lightning callbacks, one a file, for the `trainer.callbacks` of a config."""
