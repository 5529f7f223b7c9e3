"""Example inputs of transformers: sentences, images, sounds, in a batch of two, as keywords."""

from __future__ import annotations

from typing import Any

import torch

BATCH, TOKENS, VOCABULARY, PIXELS = 2, 16, 120, 32
Keywords = dict[str, Any]


def text(tokens: int = TOKENS) -> Keywords:
    """A sentence without padding."""
    ids = (torch.arange(BATCH * tokens) * 7 % (VOCABULARY - 20) + 10).view(BATCH, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pair() -> Keywords:
    """A sentence and the beginning of its translation."""
    return text() | {"decoder_input_ids": text(8)["input_ids"]}


def image(pixels: int = PIXELS) -> Keywords:
    """An image of three channels."""
    return {"pixel_values": torch.randn(BATCH, 3, pixels, pixels)}


def video(frames: int = 4) -> Keywords:
    """A clip, frames before channels."""
    return {"pixel_values": torch.randn(BATCH, frames, 3, PIXELS, PIXELS)}


def sound() -> Keywords:
    """A waveform."""
    return {"input_values": torch.randn(BATCH, 4000)}


def mels(bins: int = 16, frames: int = 64) -> Keywords:
    """A log-mel spectrogram, bins before frames, and the beginning of a transcript."""
    return {
        "input_features": torch.randn(BATCH, bins, frames),
        "decoder_input_ids": text(8)["input_ids"],
    }


def caption() -> Keywords:
    """A sentence and an image."""
    return text() | image()


def spectrogram() -> Keywords:
    """A spectrogram, frames before bins."""
    return {"input_values": torch.randn(BATCH, 64, 16)}


def speech_frames() -> Keywords:
    """Filter banks, frames before bins, and the beginning of a transcript."""
    return {
        "input_features": torch.randn(BATCH, 64, 16),
        "decoder_input_ids": text(8)["input_ids"],
    }


def speech_to_text() -> Keywords:
    """A waveform and the beginning of its transcript."""
    return sound() | {"decoder_input_ids": text(8)["input_ids"]}


def layout() -> Keywords:
    """Words and their boxes on a page."""
    corners = torch.tensor([10, 20, 30, 40]).expand(BATCH, TOKENS, 4).clone()
    return text() | {"bbox": corners}


def vilt() -> Keywords:
    """A sentence, an image and where the image has pixels."""
    mask = torch.ones(BATCH, PIXELS, PIXELS, dtype=torch.int64)
    return caption() | {"pixel_mask": mask, "token_type_ids": torch.zeros_like(text()["input_ids"])}


def visual_bert() -> Keywords:
    """A sentence and features of four regions."""
    return text() | {"visual_embeds": torch.randn(BATCH, 4, 24)}


def lxmert() -> Keywords:
    """A sentence, features of four regions, and their boxes."""
    boxes = torch.rand(BATCH, 4, 4)
    return text() | {"visual_feats": torch.randn(BATCH, 4, 24), "visual_pos": boxes}


def llava() -> Keywords:
    """A sentence with places for the image's 16 patches (token 3)."""
    found = text(24) | image()
    found["input_ids"][:, 1:17] = 3
    return found


def series() -> Keywords:
    """Three time series."""
    return {"past_values": torch.randn(BATCH, 32, 3)}


def tokens_alone() -> Keywords:
    """A sentence, without a mask."""
    return {"input_ids": text()["input_ids"]}


def larger_image() -> Keywords:
    """An image for networks that halve it many times."""
    return image(2 * PIXELS)


def image_to_text() -> Keywords:
    """An image and the beginning of its description."""
    return image() | {"decoder_input_ids": text(8)["input_ids"]}


def page() -> Keywords:
    """Words, their boxes on a page, and the page."""
    return layout() | image()


def points() -> Keywords:
    """An image and a point in it."""
    return image() | {"input_points": torch.tensor([[[[10.0, 10.0]]], [[[20.0, 5.0]]]])}


def channel() -> Keywords:
    """A waveform with an axis of channels."""
    return {"input_values": torch.randn(BATCH, 1, 4000)}


def frames() -> Keywords:
    """Filter banks, frames before bins."""
    return {"input_features": torch.randn(BATCH, 32, 16)}


def queried() -> Keywords:
    """A sentence with places for four queries (token 3), and an image."""
    found = text(24) | image()
    found["input_ids"][:, 1:5] = 3
    return found


def patches() -> Keywords:
    """Sixteen patches with their rows and columns, and the beginning of a description."""
    places = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], -1).float() + 1
    values = torch.cat([places.expand(BATCH, 16, 2), torch.randn(BATCH, 16, 48)], -1)
    return {"flattened_patches": values, "decoder_input_ids": text(8)["input_ids"]}


def past_and_future() -> Keywords:
    """A series with its past, and what is known of its future."""
    return {
        "past_values": torch.randn(BATCH, 40),
        "past_time_features": torch.randn(BATCH, 40, 2),
        "past_observed_mask": torch.ones(BATCH, 40),
        "future_values": torch.randn(BATCH, 8),
        "future_time_features": torch.randn(BATCH, 8, 2),
    }


def trajectory() -> Keywords:
    """Five steps of states, actions and rewards."""
    return {
        "states": torch.randn(BATCH, 5, 6),
        "actions": torch.randn(BATCH, 5, 3),
        "rewards": torch.randn(BATCH, 5, 1),
        "returns_to_go": torch.randn(BATCH, 5, 1),
        "timesteps": torch.arange(5).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 5, dtype=torch.int64),
    }
