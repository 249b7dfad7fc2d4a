"""Read models: what a stream of events makes, with a checkpoint that moves in the same transaction."""
