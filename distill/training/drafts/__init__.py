"""The kinds of drafts: how each is made, and how it runs for training. A new kind is a module here."""
