"""Classes in words: a classifier from a CLIP or SigLIP model and a list of labels."""
