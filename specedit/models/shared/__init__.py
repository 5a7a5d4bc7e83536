"""What several model families need: pictures, prompts, sizes."""
