"""Distillation of in-context editing into adapters: what is asked, what the teacher says, the student, and its loss."""
