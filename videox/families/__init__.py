"""What the training scripts of one family share; like the scripts, it names classes of diffusers and takes the flags.

A function stands here once a second script of the family needs it; the training step and the order of a run stay in
each script.
"""
