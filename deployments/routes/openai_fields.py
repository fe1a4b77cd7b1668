"""Every field that a client of OpenAI's API, vLLM, SGLang, llama.cpp or TGI may send, and what becomes of it.

A field that a request's class declares is served. One of `IGNORED` changes nothing that was promised; one of `REFUSED`
would, so it is refused by name, with the way on. The page FIELDS.md is made of this, and a test sends every field. A
field that nobody knows is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """`instead`: the way on. `harmless`: values that ask for nothing; null always does."""

    instead: str
    harmless: tuple[Any, ...] = ()


_HINT = "a hint about speed or cost that changes no answer"
_NO_REASONING = "this model does not reason apart from its answer"
_TEXT = "for images and sound, of which there are none"
_SAMPLER = "leave it out: this sampler is not here; temperature, top_p, top_k, min_p and three penalties are"
_LLAMA_CPP = "concerns llama.cpp's own memory"
_EXPERTS = "leave it out: no model here has experts"
_OTHER_CLUSTER = "leave it out: this service places its requests by itself"
_NOTHING_KEPT = "leave it out: nothing is kept here between requests"

IGNORED: Mapping[str, str] = {
    "metadata": "a note beside what is stored, and nothing is stored; /v1/responses sends it back",
    "service_tier": _HINT,
    "prediction": _HINT,
    "prompt_cache_key": _HINT,
    "prompt_cache_retention": _HINT,
    "prompt_cache_options": _HINT,
    "safety_identifier": "names the user's user, as `user` does",
    "verbosity": "a hint to models that are trained for it",
    "reasoning_effort": _NO_REASONING,
    "reasoning": _NO_REASONING,
    "thinking_token_budget": _NO_REASONING,
    "include_reasoning": _NO_REASONING,
    "separate_reasoning": _NO_REASONING,
    "stream_reasoning": _NO_REASONING,
    "reasoning_format": _NO_REASONING,
    "request_id": "the header X-Request-Id names a request",
    "rid": "the header X-Request-Id names a request",
    "session_id": _HINT,
    "custom_labels": "labels of the server's own metrics",
    "extra_key": _HINT,
    "spaces_between_special_tokens": "a tokenizer's matter; nothing is put between them",
    "stream_interval": "how many tokens come in one chunk is up to the load",
    "sse_ping_interval": "comments keep quiet streams open in any case",
    "media_io_kwargs": _TEXT,
    "mm_processor_kwargs": _TEXT,
    "return_mm_kwargs": _TEXT,
    "images_config": _TEXT,
    "max_dynamic_patch": _TEXT,
    "min_dynamic_patch": _TEXT,
    "use_audio_in_video": _TEXT,
    "cache_prompt": _HINT,
    "n_cache_reuse": _HINT,
    "id_slot": _LLAMA_CPP,
    "n_keep": _LLAMA_CPP + ": a prompt that is too long is refused here, not cut",
    "n_discard": _LLAMA_CPP + ": a prompt that is too long is refused here, not cut",
    "backend_sampling": _LLAMA_CPP,
    "samplers": "the order of samplers does not change which are asked for",
    "parse_tool_calls": "calls of functions are always read",
}

REFUSED: Mapping[str, Refused] = {
    # OpenAI
    "best_of": Refused("/v1/completions has it; here use n", (1,)),
    "echo": Refused("/v1/completions has it", (False,)),
    "suffix": Refused("/v1/completions has it", ("",)),
    "tools": Refused("/v1/chat/completions and /v1/responses have it", ([],)),
    "tool_choice": Refused("/v1/chat/completions and /v1/responses have it", ("none", "auto")),
    "parallel_tool_calls": Refused("/v1/chat/completions and /v1/responses have it", (True, False)),
    "functions": Refused("/v1/chat/completions has it; elsewhere use tools", ([],)),
    "function_call": Refused("/v1/chat/completions has it; elsewhere use tool_choice", ("none", "auto")),
    "modalities": Refused("this model reads and writes text only", (["text"],)),
    "audio": Refused("this model reads and writes text only"),
    "image": Refused("this model reads and writes text only"),
    "web_search_options": Refused("nothing is searched here: give the model what you found, or a tool that searches"),
    "store": Refused("nothing is kept here: leave it out or send false", (False,)),
    "moderation": Refused("nothing is moderated here: leave it out"),
    "access_programs": Refused("leave it out: it is OpenAI's own", ([],)),
    "background": Refused("leave it out and read the stream, or send a list with `caravan batch`", (False,)),
    "background_options": Refused(_NOTHING_KEPT),
    "conversation": Refused("nothing is kept here: send the conversation so far as input"),
    "previous_response_id": Refused("nothing is kept here: send the conversation so far as input"),
    "messages": Refused("/v1/chat/completions has it"),
    "prompt": Refused("/v1/completions has it; a chat has messages, a response input"),
    "input": Refused("/v1/responses has it"),
    "instructions": Refused("/v1/responses has it; a chat has system messages"),
    "text": Refused("/v1/responses has it; elsewhere use response_format"),
    "include": Refused("/v1/responses has it", ([],)),
    "truncation": Refused("use truncate_prompt_tokens", ("disabled",)),
    "max_output_tokens": Refused("use max_tokens"),
    "max_completion_tokens": Refused("use max_tokens, in /v1/responses max_output_tokens"),
    "max_tokens": Refused("use max_output_tokens"),
    "top_logprobs": Refused("use logprobs", (0,)),
    "logprobs": Refused("use top_logprobs", (False,)),
    "n": Refused("send the request as often as you want answers", (1,)),
    "response_format": Refused("use text", ({"type": "text"},)),
    "context_management": Refused("leave it out: a context that is too long is refused", ([],)),
    "max_tool_calls": Refused("it bounds OpenAI's own tools, which are not here: leave it out"),
    # vLLM
    "use_beam_search": Refused("use n or best_of", (False,)),
    "length_penalty": Refused("it belongs to beam search, which is not here", (1, 1.0)),
    "watermarking": Refused("leave it out: no watermark is put into answers", (False,)),
    "prompt_embeds": Refused("send the prompt as text or token ids"),
    "allowed_token_ids": Refused("use logit_bias, or guided_regex or guided_choice"),
    "bad_words": Refused("use logit_bias", ([],)),
    "prompt_logprobs": Refused("use echo with logprobs in /v1/completions"),
    "logprob_token_ids": Refused("use top_logprobs"),
    "add_generation_prompt": Refused("/v1/chat/completions has it", (True, False)),
    "continue_final_message": Refused("/v1/chat/completions has it; a completion always continues", (False,)),
    "chat_template": Refused("the checkpoint's own is used: send a prompt of your own to /v1/completions"),
    "chat_template_kwargs": Refused("/v1/chat/completions has it", ({},)),
    "documents": Refused("write them into a message", ([],)),
    "add_special_tokens": Refused("the template writes them; /v1/completions has it", (False,)),
    "parse_special": Refused("the template writes them; /v1/completions has it", (False,)),
    "guided_json": Refused("use text or structured_outputs"),
    "guided_regex": Refused("use text or structured_outputs"),
    "guided_choice": Refused("use text or structured_outputs"),
    "guided_grammar": Refused("use text or structured_outputs"),
    "return_token_ids": Refused("/v1/chat/completions has it", (False,)),
    "return_tokens_as_token_ids": Refused("/v1/chat/completions has it", (False,)),
    "guided_whitespace_pattern": Refused("leave it out: up to 16 characters of white space stand between JSON's parts"),
    "guided_decoding_backend": Refused("leave it out: there is one"),
    "structural_tag": Refused('use response_format: {"type": "structural_tag", "format": ...}'),
    "return_prompt_text": Refused("/tokenize shows the prompt", (False,)),
    "return_token_offsets": Refused("leave it out: text_offset stands in a completion's logprobs", (False,)),
    "routed_experts_prompt_start": Refused(_EXPERTS, (0,)),
    "kv_transfer_params": Refused(_OTHER_CLUSTER),
    "ec_transfer_params": Refused(_OTHER_CLUSTER),
    "vllm_xargs": Refused("leave it out: these are arguments of vLLM's plug-ins"),
    "repetition_detection": Refused("use repetition_penalty or frequency_penalty"),
    "logits_processors": Refused("use logit_bias", ([],)),
    # SGLang
    "regex": Refused("use text or structured_outputs"),
    "ebnf": Refused("use text or structured_outputs"),
    "json_schema": Refused("use text or structured_outputs"),
    "return_hidden_states": Refused("leave it out: answers are text", (False,)),
    "return_routed_experts": Refused(_EXPERTS, (False,)),
    "routed_experts_start_len": Refused(_EXPERTS, (0,)),
    "return_cached_tokens_details": Refused("usage.prompt_tokens_details has cached_tokens", (False,)),
    "return_prompt_token_ids": Refused("use return_token_ids", (False,)),
    "return_meta_info": Refused("leave it out: usage has the counts", (False,)),
    "stop_regex": Refused("use stop, or guided_regex for the whole answer"),
    "no_stop_trim": Refused("use include_stop_str_in_output", (False,)),
    "lora_path": Refused("an adapter is asked for by the name of a model"),
    "session_params": Refused(_NOTHING_KEPT),
    "custom_params": Refused("leave it out: these are arguments of SGLang's plug-ins", ({},)),
    "custom_logit_processor": Refused("use logit_bias"),
    "input_ids": Refused("send token ids as the prompt of /v1/completions"),
    "ngram_corpus_id": Refused("leave it out: drafts are the engine's own matter"),
    "task": Refused("leave it out: it belongs to another model"),
    "bootstrap_host": Refused(_OTHER_CLUSTER),
    "bootstrap_port": Refused(_OTHER_CLUSTER),
    "bootstrap_room": Refused(_OTHER_CLUSTER),
    "routed_dp_rank": Refused(_OTHER_CLUSTER),
    "disagg_prefill_dp_rank": Refused(_OTHER_CLUSTER),
    "data_parallel_rank": Refused(_OTHER_CLUSTER),
    # llama.cpp
    "grammar": Refused("use text or structured_outputs"),
    "n_predict": Refused("use max_tokens", (-1,)),
    "n_cmpl": Refused("use n", (1,)),
    "n_indent": Refused("use guided_regex", (0,)),
    "n_probs": Refused("use logprobs", (0,)),
    "post_sampling_probs": Refused("leave it out: logprobs are those of the model", (False,)),
    "min_keep": Refused(_SAMPLER, (0,)),
    "repeat_penalty": Refused("use repetition_penalty", (1, 1.0)),
    "repeat_last_n": Refused("repetition_penalty counts the whole text: leave it out", (-1,)),
    "top_n_sigma": Refused(_SAMPLER, (-1, -1.0)),
    "typical_p": Refused(_SAMPLER, (1, 1.0)),
    "dynatemp_range": Refused(_SAMPLER, (0, 0.0)),
    "dynatemp_exponent": Refused(_SAMPLER, (1, 1.0)),
    "xtc_probability": Refused(_SAMPLER, (0, 0.0)),
    "xtc_threshold": Refused(_SAMPLER, (1, 1.0)),
    "dry_multiplier": Refused(_SAMPLER, (0, 0.0)),
    "dry_base": Refused(_SAMPLER),
    "dry_allowed_length": Refused(_SAMPLER),
    "dry_penalty_last_n": Refused(_SAMPLER, (0,)),
    "dry_sequence_breakers": Refused(_SAMPLER),
    "mirostat": Refused(_SAMPLER, (0,)),
    "mirostat_tau": Refused(_SAMPLER),
    "mirostat_eta": Refused(_SAMPLER),
    "adaptive_target": Refused(_SAMPLER, (-1, -1.0)),
    "adaptive_decay": Refused(_SAMPLER),
    "t_max_predict_ms": Refused("use max_tokens", (-1,)),
    "response_fields": Refused("leave it out: every answer has all its fields", ([],)),
    "return_tokens": Refused("use return_token_ids", (False,)),
    "return_progress": Refused("leave it out: it is not told", (False,)),
    "timings_per_token": Refused("leave it out: /metrics has the times", (False,)),
    "verbose": Refused("leave it out: /tokenize shows the prompt", (False,)),
    "lora": Refused("an adapter is asked for by the name of a model", ([],)),
    "grammar_lazy": Refused('use response_format: {"type": "structural_tag", "format": ...}', (False,)),
    "grammar_triggers": Refused('use response_format: {"type": "structural_tag", "format": ...}', ([],)),
    # TGI
    "tool_prompt": Refused("write it into the system message"),
    "guideline": Refused("write it into the system message"),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLING = (
    "max_tokens temperature top_p presence_penalty frequency_penalty logit_bias seed stop stream stream_options n user"
)
_VLLM_AND_SGLANG = "top_k min_p min_tokens repetition_penalty stop_token_ids ignore_eos skip_special_tokens priority"
KNOWN_TO: Mapping[str, frozenset[str]] = {
    "OpenAI": _names(
        f"""{_SAMPLING} model messages prompt audio function_call functions logprobs max_completion_tokens metadata
        modalities moderation parallel_tool_calls prediction prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning_effort response_format safety_identifier service_tier store tool_choice tools
        top_logprobs verbosity web_search_options best_of echo suffix access_programs background background_options
        context_management conversation image include input instructions max_output_tokens max_tool_calls
        previous_response_id reasoning text truncation"""
    ),
    "vLLM": _names(
        f"""{_SAMPLING} {_VLLM_AND_SGLANG} model messages prompt logprobs top_logprobs max_completion_tokens
        response_format tools tool_choice parallel_tool_calls reasoning_effort thinking_token_budget include_reasoning
        echo suffix best_of use_beam_search watermarking length_penalty include_stop_str_in_output
        spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
        allowed_token_ids bad_words add_generation_prompt continue_final_message add_special_tokens documents
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs request_id session_id
        return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets return_prompt_text
        return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
        stream_interval prompt_embeds guided_json guided_regex guided_choice guided_grammar guided_whitespace_pattern
        guided_decoding_backend structural_tag logits_processors"""
    ),
    "SGLang": _names(
        f"""{_SAMPLING} {_VLLM_AND_SGLANG} model messages prompt logprobs top_logprobs max_completion_tokens
        response_format tools tool_choice parallel_tool_calls echo suffix best_of return_hidden_states
        return_routed_experts routed_experts_start_len return_cached_tokens_details return_prompt_token_ids
        return_token_ids return_meta_info reasoning_effort reasoning task regex ebnf json_schema stop_regex no_stop_trim
        continue_final_message lora_path session_id session_params separate_reasoning stream_reasoning
        chat_template_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video images_config
        custom_logit_processor custom_params input_ids rid extra_key cache_salt ngram_corpus_id bootstrap_host
        bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank data_parallel_rank custom_labels"""
    ),
    "llama.cpp": _names(
        f"""{_SAMPLING} model messages prompt logprobs top_logprobs response_format tools tool_choice
        parallel_tool_calls parse_tool_calls top_k min_p ignore_eos verbose timings_per_token cache_prompt return_tokens
        return_progress sse_ping_interval n_predict max_completion_tokens n_indent n_keep n_discard n_cmpl n_cache_reuse
        t_max_predict_ms response_fields top_n_sigma xtc_probability xtc_threshold typical_p dynatemp_range
        dynatemp_exponent repeat_last_n repeat_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n
        dry_sequence_breakers mirostat mirostat_tau mirostat_eta adaptive_target adaptive_decay n_probs min_keep
        backend_sampling post_sampling_probs lora json_schema grammar grammar_lazy grammar_triggers samplers id_slot
        chat_template_kwargs add_generation_prompt reasoning_format parse_special"""
    ),
    "TGI": _names(
        f"""{_SAMPLING} model messages prompt suffix logprobs top_logprobs response_format tools tool_choice tool_prompt
        guideline"""
    ),
}
