"""Which options OpenAI's and vLLM's request schemas have, by route.

OpenAI's as its official client has them (3.54); vLLM's copied from `vllm/entrypoints/openai/*/protocol.py` (2026-11),
and what was in them earlier and is still sent by clients that were written then.
"""

from __future__ import annotations

from collections.abc import Mapping

OPENAI: Mapping[str, frozenset[str]] = {
    "chat": frozenset("""
messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
metadata modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options
prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream_options
temperature tool_choice tools top_logprobs top_p user verbosity web_search_options stream
""".split()),
    "completions": frozenset("""
model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream_options
suffix temperature top_p user stream
""".split()),
}  # fmt: skip
VLLM: Mapping[str, frozenset[str]] = {
    "chat": frozenset("""
messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
response_format seed stop stream stream_options temperature top_p tools tool_choice reasoning_effort
thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p repetition_penalty
watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id
session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
return_prompt_text return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
stream_interval
""".split()),
    "completions": frozenset("""
model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty
stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds
add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval
""".split()),
}  # fmt: skip
VLLM_EARLIER = frozenset("""
best_of guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
structural_tag logits_processors guided_json_object
""".split())  # fmt: skip
