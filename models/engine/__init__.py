"""What a training run needs besides its loss: processes, optimizer, run state, logs."""
