"""Text and image encoders, one a file behind one signature, and the stage that runs them over the items."""
