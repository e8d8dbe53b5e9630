"""A second embedded model: a tiny Stable Diffusion that writes words of one to three letters."""
