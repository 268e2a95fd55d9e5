"""Ask an engine. Run by the engine's own interpreter, which need not have slimvlm.

Usage: ``python ask_engine.py answer MODULE FOLDER...``, the module being a key of `ENGINES`. Each
folder has a ``request.json``; ``replies.json`` is written to it. ``python ask_engine.py time MODULE
FOLDER`` loads the one checkpoint, prints its version as a line of JSON, and then answers each such
line of prompts, a number of new tokens and a clock by a line with times.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

Ids = list[int]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""How time passes: for everybody, or while this process computes."""

PICTURE = "<__media__>"
"""Stands for a picture in a text that llama.cpp is given."""


class Vllm:
    """vLLM, in this one process."""

    def __init__(self, asked: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(asked.get("cache_gib", 1)))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        draft: dict[str, Any] = {}
        if asked.get("draft"):
            how = {"method": "draft_model", "num_speculative_tokens": asked["proposed"]}
            draft["speculative_config"] = {**how, "model": asked["draft"]}
        self._model = vllm.LLM(
            asked["checkpoint"],
            dtype=asked["dtype"],
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=asked["max_length"],
            max_num_seqs=asked["at_once"],
            **({"limit_mm_per_prompt": {"image": 1}} if asked["sees"] else {}),
            **draft,
        )
        self._sampling: Any = vllm.SamplingParams
        self.prompt_tokens: list[int] = []

    def answer(self, prompts: list[dict[str, Any]], new_tokens: int) -> list[Ids]:
        """Token ids of greedy replies."""
        from PIL import Image

        given = []
        for prompt in prompts:
            given.append({"prompt_token_ids": prompt["ids"]})
            if prompt["picture"]:
                given[-1]["multi_modal_data"] = {"image": Image.open(prompt["picture"])}
        how = self._sampling(temperature=0, max_tokens=new_tokens)
        found = self._model.generate(given, how, use_tqdm=False)
        self.prompt_tokens = [len(each.prompt_token_ids) for each in found]
        return [list(each.outputs[0].token_ids) for each in found]

    def time(self, prompts: list[Ids], new_tokens: int, clock: str) -> list[list[float]]:
        """When each step of each reply came, in seconds; with a draft, a step is a round."""
        engine, now = self._model.llm_engine, CLOCKS[clock]
        start = now()
        for number, ids in enumerate(prompts):
            how = self._sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            engine.add_request(str(number), {"prompt_token_ids": ids}, how)
        came: list[list[float]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for found in engine.step():
                came[int(found.request_id)].append(now() - start)
        return came


class LlamaCpp:
    """llama.cpp, through xllamacpp."""

    def __init__(self, asked: dict[str, Any]) -> None:
        os.environ["LLAMA_MEDIA_MARKER"] = PICTURE
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = asked["checkpoint"]
        settings.mmproj.path = asked.get("pictures", "")
        settings.n_parallel, settings.warmup = asked["at_once"], False
        settings.n_ctx = asked["at_once"] * asked["max_length"]
        cores = len(os.sched_getaffinity(0))
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = cores
        whole = xllamacpp.ggml_type.GGML_TYPE_F32  # keys and values would be float16
        settings.cache_type_k = settings.cache_type_v = whole
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(settings)
        self._picture_text = asked.get("picture_text")

    def answer(self, prompts: list[dict[str, Any]], new_tokens: int) -> list[str]:
        """Texts of greedy replies."""
        how = {"n_predict": new_tokens, "temperature": 0.0, "top_k": 1}
        return [self._reply({"prompt": self._given(prompt), **how}) for prompt in prompts]

    def _reply(self, asked: dict[str, Any]) -> str:
        """Return the text; raise with the server's message."""
        place = f"{self._server.listening_address}/completion"
        body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        try:
            with urlopen(Request(place, body, kind)) as reply:
                text: str = json.load(reply)["content"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["error"]["message"]) from error
        return text

    def _given(self, prompt: dict[str, Any]) -> Any:
        """Token ids, or a text and a picture."""
        if not prompt["picture"]:
            return prompt["ids"]
        picture = b64encode(Path(prompt["picture"]).read_bytes()).decode()
        text = prompt["text"].replace(self._picture_text, PICTURE)
        return {"prompt_string": text, "multimodal_data": [picture]}

    def time(self, prompts: list[Ids], new_tokens: int, clock: str) -> list[list[float]]:
        """When each step of each reply came, in seconds."""
        how = {"n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True}
        how |= {"stream": True, "cache_prompt": False}
        came: list[list[float]] = [[] for _ in prompts]
        now = CLOCKS[clock]
        start = now()

        def ask(number: int) -> None:
            def note(_: Any) -> None:
                came[number].append(now() - start)

            self._server.handle_completions({"prompt": prompts[number], **how}, note)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [steps[:new_tokens] for steps in came]  # one more says that it is the end


class OpenVino:
    """OpenVINO, through optimum-intel, which converts the checkpoint on the way."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from optimum import intel
        from transformers import AutoProcessor, AutoTokenizer

        sees, folder = asked["sees"], asked["checkpoint"]
        classes = (intel.OVModelForCausalLM, intel.OVModelForVisualCausalLM)
        whole = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        exact = dict.fromkeys(whole, "f32") | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        self._model: Any = classes[sees].from_pretrained(
            folder, export=True, load_in_8bit=False, ov_config=exact
        )
        self._reads: Any = (AutoTokenizer, AutoProcessor)[sees].from_pretrained(folder)

    def answer(self, prompts: list[dict[str, Any]], new_tokens: int) -> list[Ids]:
        """Token ids of greedy replies."""
        from PIL import Image

        replies = []
        for prompt in prompts:
            shown = [[Image.open(prompt["picture"])]] if prompt["picture"] else None
            pictures = {"images": shown} if shown else {}
            inputs = self._reads(
                text=[prompt["text"]],
                add_special_tokens=prompt["adds_special_tokens"],
                return_tensors="pt",
                **pictures,
            )
            found = self._model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            replies.append(found[0, inputs["input_ids"].shape[1] :].tolist())
        return replies


class OnnxRuntime:
    """ONNX Runtime GenAI; its model builder converts the checkpoint first."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import onnxruntime_genai

        self._folder = tempfile.TemporaryDirectory()
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32"]
        places = ["-e", "cpu", "-i", asked["checkpoint"], "-o", self._folder.name]
        done = subprocess.run([*builder, *places], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        self._library: Any = onnxruntime_genai
        self._model = onnxruntime_genai.Model(self._folder.name)

    def answer(self, prompts: list[dict[str, Any]], new_tokens: int) -> list[Ids]:
        """Token ids of greedy replies."""
        replies: list[Ids] = []
        for prompt in prompts:
            settings = self._library.GeneratorParams(self._model)
            longest = len(prompt["ids"]) + new_tokens
            settings.set_search_options(max_length=longest, do_sample=False)
            generator = self._library.Generator(self._model, settings)
            generator.append_tokens(prompt["ids"])
            replies.append([])
            while not generator.is_done() and len(replies[-1]) < new_tokens:
                generator.generate_next_token()
                replies[-1].append(int(generator.get_next_tokens()[0]))
        return replies


ENGINES: dict[str, Any] = {
    "vllm": Vllm,
    "xllamacpp": LlamaCpp,
    "openvino": OpenVino,
    "onnxruntime_genai": OnnxRuntime,
}
"""By the module that they are imported as."""


def version_of(module: str) -> str:
    """An engine's own version, without that of its source."""
    found = getattr(import_module(module), "__version__", None) or version(module)
    return str(found).partition("-")[0]


def message(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split()) or repr(error)


def answer(module: str, folders: list[str]) -> None:
    """Answer every request; an engine's error is written as its reply."""
    for folder in map(Path, folders):
        asked = json.loads((folder / "request.json").read_text())
        written: dict[str, Any] = {}
        try:
            engine = ENGINES[module](asked)
            written["replies"] = engine.answer(asked["prompts"], asked["max_new_tokens"])
            written["prompt_tokens"] = getattr(engine, "prompt_tokens", [])
            del engine
        except Exception as error:  # engines raise almost anything
            written["error"] = message(error)
        written["version"] = version_of(module)
        (folder / "replies.json").write_text(json.dumps(written))
        gc.collect()
        if module == "vllm":  # make room for the next model
            import_module("vllm.distributed").cleanup_dist_env_and_memory()


def serve(module: str, folder: str) -> None:
    """Load a checkpoint, and time what is asked for line by line."""
    spoken = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print, too
    engine = ENGINES[module](json.loads((Path(folder) / "request.json").read_text()))
    print(json.dumps({"version": version_of(module)}), file=spoken, flush=True)
    for line in sys.stdin:
        came = engine.time(**json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": came, "peak_bytes": peak}), file=spoken, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1] == "answer":
        answer(sys.argv[2], sys.argv[3:])
    else:
        serve(*sys.argv[2:])
