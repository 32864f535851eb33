"""Editors that turn the gradient of an edit into a better weight update: what MEND and IBKE share."""
