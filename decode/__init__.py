"""Stage 3: plain and speculative decoding with BitNet teachers and their drafts."""
