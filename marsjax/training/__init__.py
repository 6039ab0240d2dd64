"""One training step for both stages, lifted over devices, driven by one loop, checkpointed whole."""
