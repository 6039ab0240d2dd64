"""CTR backbones, swapped as a set: each is a Flax module `(batch, tables) -> logit_B`."""
