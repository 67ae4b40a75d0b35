"""Checkpoints with random weights, from tiny to the shape of Qwen2-VL-7B, and what a device can do at most.

Time does not depend on what the weights are, so a shape is enough to measure with; what it answers means nothing. A vocabulary is learned from made-up words; the head has as many rows as the shape says.
"""
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from vlm_repro.models.tiny import SPECIALS, build_processor, save_tiny, train_tokenizer

WORDS = [f"{a}{b}{c}" for a in ("ba", "ke", "li", "mo", "su", "ta", "ve") for b in ("n", "r", "s", "l") for c in ("a", "do", "en", "ig", "o", "ut")]
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"text": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
             "vision": {"depth": 4, "embed_dim": 160, "num_heads": 5, "mlp_ratio": 4}, "sections": [4, 6, 6], "std": 0.15},
    "qwen2-vl-2b": {"text": {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                             "tie_word_embeddings": True}, "vision": TOWER, "sections": [16, 24, 24], "std": 0.02},
    "qwen2-vl-7b": {"text": {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                             "tie_word_embeddings": False}, "vision": TOWER, "sections": [16, 24, 24], "std": 0.02}}
LONGEST = 32_768


def config_of(shape: str, tokenizer: hf.PreTrainedTokenizerFast) -> hf.Qwen2VLConfig:
    """The configuration of a shape."""
    ids, sizes = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}, SHAPES[shape]
    special = {"eos_token_id": ids["<|im_end|>"], "bos_token_id": None, "pad_token_id": ids["<|endoftext|>"]}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sizes["sections"]}, **special, **sizes["text"]}
    return hf.Qwen2VLConfig(
        text_config=text, vision_config={**sizes["vision"], "hidden_size": sizes["text"]["hidden_size"]}, tie_word_embeddings=sizes["text"]["tie_word_embeddings"],
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


def build(folder: Path, shape: str, device: str = "cpu", max_pixels: int = 602_112) -> Path:
    """Write a checkpoint of a shape: float32 for a processor, bfloat16 for anything else."""
    tokenizer = train_tokenizer(" " + w for w in WORDS * 3)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device), torch.no_grad():
            model = hf.Qwen2VLForConditionalGeneration(config_of(shape, tokenizer))
            for p in model.parameters():
                if p.dim() > 1: torch.nn.init.normal_(p, std=SHAPES[shape]["std"])
    finally: torch.set_default_dtype(before)
    processor = build_processor(tokenizer, max_pixels)
    if shape == "tiny":
        save_tiny(folder, model, processor, {"what": "random weights for a benchmark", "shape": shape})
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        hf.GenerationConfig(do_sample=False, eos_token_id=model.config.text_config.eos_token_id, pad_token_id=model.config.text_config.pad_token_id).save_pretrained(folder)
    return folder


def device_figures(model: Any, seconds: float, answers: int, timings: list[dict[str, Any]], peak: dict[str, float]) -> dict[str, Any]:
    """What a run made of its device: answers and tokens a second, largest memory, shares of its peak where that is known."""
    cuda = torch.device(str(model.net.device)).type == "cuda"
    prompt, new = sum(t["n_prompt"] for t in timings), sum(t["n_new"] for t in timings)
    return {"device": torch.cuda.get_device_name(model.net.device) if cuda else "cpu", "answers_per_s": answers / seconds, "new_tokens_per_s": new / seconds, "prompt_tokens_per_s": prompt / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(model.net.device) if cuda else None, "share_of_peak": dict(peak), "parameters": sum(p.numel() for p in model.net.parameters())}
