"""Names of the inputs and outputs of an encoder-decoder's two graphs: those of optimum, and those of prefixes."""

from __future__ import annotations

ENCODER_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "prefix_key_names": "prefix_key_values.%d.encoder.key",
    "prefix_value_names": "prefix_key_values.%d.encoder.value",
}
ENCODER_OUTPUTS = {
    "hidden_states": "last_hidden_state",
    "cross_present_key_names": "present.%d.encoder.key",
    "cross_present_value_names": "present.%d.encoder.value",
}
DECODER_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "encoder_attention_mask": "encoder_attention_mask",
    "prefix_length": "prefix_length",
    "past_key_names": "past_key_values.%d.decoder.key",
    "past_value_names": "past_key_values.%d.decoder.value",
    "cross_past_key_names": "past_key_values.%d.encoder.key",
    "cross_past_value_names": "past_key_values.%d.encoder.value",
}
DECODER_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.decoder.key",
    "present_value_names": "present.%d.decoder.value",
}
