"""What several tests in this folder use."""

import torch

CALL = dict(
    image=None, prompt="make it red", prompt_2=None, negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0,
    height=128, width=128, sigmas=None, guidance_scale=3.5, num_images_per_prompt=1, generator=None, latents=None,
    prompt_embeds=None, pooled_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None,
    negative_ip_adapter_image=None, negative_ip_adapter_image_embeds=None, negative_prompt_embeds=None,
    negative_pooled_prompt_embeds=None, joint_attention_kwargs=None, callback_on_step_end_tensor_inputs=["latents"],
    max_sequence_length=8, max_area=128 * 128, _auto_resize=False,
)  # fmt: skip


def random_like(layout, batch=1, seed=3):
    return torch.randn(batch, layout.tokens, 16, generator=torch.Generator().manual_seed(seed))
