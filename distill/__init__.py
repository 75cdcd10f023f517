"""Collecting a BitNet teacher's distributions, and training, judging and publishing drafts on them."""
