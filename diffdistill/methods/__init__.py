"""Image, video and diffusion-language methods: one file per paper."""
