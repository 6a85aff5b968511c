"""Generation with vLLM: continuous batching and paged attention, on CUDA and on CPU.

vLLM is imported when an engine is made, because it reads its environment variables then.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cream.engines import Completion, Request, Sampling, row_seed
from cream.errors import UserError
from cream.files.folders import remote_code
from cream.model.hardware import keep_freed_memory


class VllmEngine:
    """One vLLM engine in this process (CPU) or in a child of it (CUDA). Raises UserError when vLLM cannot start."""

    def __init__(self, folder: str | Path, tokenizer, device: str, dtype: str, max_model_len: int, *memory):
        """memory: gpu_memory_utilization and tensor_parallel_size, as `engine_options` takes them."""
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        _check_complete(Path(folder), dtype)
        options = engine_options(device, dtype, max_model_len, *memory)
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        self.chooser = _token_chooser() if device == "cpu" else None
        processors = [self.chooser] if self.chooser else None
        args = EngineArgs(  # ids in, ids out
            model=str(folder), skip_tokenizer_init=True, logits_processors=processors, **options
        )
        try:
            # As vLLM's own LLM class, it takes the batch sizes for throughput, by the device.
            self.engine = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
        except ValueError as error:
            raise UserError(f"vLLM cannot run {folder} on {device}: {error}\n(--engine hf may)") from error
        if device == "cpu":
            keep_freed_memory()  # logits and their log-probabilities are made anew at each step
        # With `skip_tokenizer_init` it has none, and so could not find stop strings; this one is used for these alone.
        self.engine.output_processor.tokenizer = tokenizer
        # Twice as many responses are in flight as are decoded together, so that none waits for its prompt.
        self.window = 2 * self.engine.vllm_config.scheduler_config.max_num_seqs
        self.words = self.engine.model_config.get_vocab_size()

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[str, list[Completion]]]:
        """As Engine.generate; a bounded number of responses is in flight, a prompt comes back with its last one."""
        from vllm.inputs import TokensPrompt

        requests = iter(requests)
        in_flight: set[str] = set()
        try:
            while True:
                while self.engine.get_num_unfinished_requests() < self.window:  # responses, not prompts
                    if (request := next((r for r in requests if not r.done), None)) is None:
                        break
                    prompt = TokensPrompt(prompt_token_ids=request.prompt_ids)
                    self.engine.add_request(request.uuid, prompt, self._params(request, sampling))
                    in_flight.add(request.uuid)
                if not in_flight:
                    return
                if self.chooser:
                    self.chooser.sampling = sampling
                for output in self.engine.step():
                    in_flight.remove(output.request_id)
                    outputs = sorted(output.outputs, key=lambda each: each.index)
                    yield output.request_id, [self._completion(each, sampling) for each in outputs]
        finally:
            self.engine.abort_request(list(in_flight))  # whoever asked has stopped listening

    def close(self) -> None:
        """Shut the engine down, its worker processes included."""
        self.engine.engine_core.shutdown()

    def _completion(self, output, sampling: Sampling) -> Completion:
        matched = isinstance(output.stop_reason, str)  # a stop string; the id of a stop token, or None
        return Completion.of(list(output.token_ids), output.cumulative_logprob, sampling, self.tokenizer, matched)

    def _params(self, request: Request, sampling: Sampling):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.n,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy or self.chooser else sampling.top_p,
            top_k=0 if self.chooser else sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=request.room(sampling, self.max_model_len),
            seed=row_seed(sampling.seed, request.uuid, 0),  # response i gets seed + i: hashed seeds lie far apart
            stop_token_ids=[i for i in sampling.stop_token_ids if i < self.words],  # vLLM refuses any other
            ignore_eos=True,  # stop at the tokens above and at no others
            logprobs=0 if sampling.logprobs else None,  # of the sampled token alone, raw: before penalties too
            flat_logprobs=True,  # numbers in lists, not an object for every token
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,  # a stop string may be one
            output_kind=RequestOutputKind.FINAL_ONLY,  # the default loses responses when n > 1
        )


def _token_chooser() -> type:
    """A logits processor that chooses the tokens in vLLM's place, after temperature and min-p: all others get -inf. On
    a CPU vLLM itself sorts the vocabulary's indices for each token, and its draw takes longer the more words are left.
    To be told its `sampling` before each step of an engine in this process."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    from cream.engines.draw import draw
    from cream.engines.noise import splitmix64
    from cream.engines.warp import keep_top_k

    class Chooser(LogitsProcessor):
        sampling: Sampling

        def __init__(self, vllm_config, device, is_pin_memory):
            self.rows: dict[int, tuple[int, list[int]]] = {}  # of the batch: a response's seed and its tokens so far

        def is_argmax_invariant(self):
            return True  # not called for greedy responses

        def update_state(self, batch_update):
            process_dict_updates(self.rows, batch_update, lambda params, prompt_ids, ids: (params.seed, ids))

        def apply(self, logits):
            seeds, tokens = zip(*(self.rows[i] for i in range(len(logits))), strict=True)
            streams = splitmix64(torch.tensor(seeds), torch.tensor([len(ids) for ids in tokens]))
            chosen = draw(keep_top_k(logits, self.sampling.top_k), self.sampling.top_p, streams)
            return logits.fill_(-torch.inf).scatter_(-1, chosen[:, None], 0.0)

    return Chooser


def _check_complete(folder: Path, dtype: str) -> None:
    """Raises UserError where weights are missing: vLLM starts all the same, on what its memory happens to hold."""
    import torch

    from cream.model.load import load_policy

    load_policy(folder, getattr(torch, dtype), torch.device("meta"))


def engine_options(
    device: str, dtype: str, max_model_len: int, gpu_memory_utilization: float = 0.9, tensor_parallel_size: int = 1
) -> dict:
    """What vLLM is started with on a device ("cpu" or "cuda"), model and tokenizer apart.

    Also sets the environment variables that vLLM reads when it is imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would call home
    os.environ["VLLM_MAX_N_SEQUENCES"] = str(2**31 - 1)  # responses per prompt; no limit of the other engine's
    if device == "cpu":
        # In one process the engine is up in seconds and leaves no children behind when it is killed.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        platform = {
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "gpu_memory_utilization": 0.2,  # of main memory; with more it may refuse to start
            "enable_chunked_prefill": False,  # a seeded prompt that is split crashes on CPU
            "max_num_batched_tokens": max(max_model_len, 8192),
            "block_size": 32,  # whole blocks are shared: of vLLM's 128 tokens few prompts fill one
        }
    else:
        platform = {"gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size}
    return {
        "dtype": dtype,
        "trust_remote_code": remote_code(),
        "max_model_len": max_model_len,
        "config_format": "hf",  # what the other stages read, not a copy in Mistral's own layout
        "load_format": "safetensors",
        "enable_prefix_caching": True,  # a prompt is computed once for all its responses
        "generation_config": "vllm",  # the folder's top-k, penalties and stop tokens must not leak in
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **platform,
    }
