"""Attention over several processes, in gloo on the CPU: each function of CASES runs in all of them at once.

`results(degrees)` starts the processes once, and gives what each case returned in each process. A case that raises
gives its error's text under "error".
"""

import gc
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

TEXT = 24  # tokens, of which each of 4 processes has as many
HEADS, LENGTH = 4, 512  # of single calls
GRID = (16, 24)  # 384 tokens; the rest are text


class World:
    """One process among several. ring, ulysses: the degrees of Diffusers' context parallelism."""

    def __init__(self, ring: int, ulysses: int):
        self.ring, self.ulysses = ring, ulysses
        self.rank, self.size = dist.get_rank(), ring * ulysses

    def config(self, **options):
        from diffusers import ContextParallelConfig

        return ContextParallelConfig(ring_degree=self.ring, ulysses_degree=self.ulysses, **options)

    def spread(self, **options):
        """The spread of a model whose parallelism is enabled."""
        from dma_diffusers.parallel import Spread

        model = tiny("wan").model
        model.enable_parallelism(config=self.config(**options))
        return Spread.of(model._parallel_config)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part."""
        return x.chunk(self.size, dim)[self.rank].contiguous()

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' parts, one after the other."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)


def tiny(name: str):
    """A tiny model with a call of it, the same in every process; its tokens and text are divided by 4."""
    from tests.dma_diffusers import tiny_models

    torch.manual_seed(0)
    sizes = {"wan": (2, 16, 3, 16, 24), "ltx": (1, 4, 3, 10, 12), "qwen": (1, 1, 32, 40)}
    case = tiny_models.make(name)
    case.prompt_tokens = TEXT
    if name in sizes:
        case.latents = torch.randn(sizes[name])
    if name == "ltx":
        # Diffusers' Ulysses fails over LTX's mask of text, which has a row for each of all heads.
        case.inputs |= {"width": 12, "encoder_attention_mask": None}
    if name == "qwen":
        case.inputs |= {
            "img_shapes": [[(1, 16, 20)]],
            "encoder_hidden_states_mask": torch.arange(TEXT)[None] % 5 != 3,
        }
    if name == "flux":
        case.inputs["txt_ids"] = torch.zeros(TEXT, 3)
    if name == "flux2":  # whose plan splits positions that have a batch
        case.inputs["txt_ids"] = torch.zeros(1, TEXT, 4)
    return case


class Exact:
    """Full precision in the operator's place; keeps the keys and the text of its calls."""

    def __init__(self, model):
        from dma_diffusers.attach import interceptions

        self.calls: list[tuple[torch.Tensor, dict]] = []
        for interception in interceptions(model).values():
            interception.stand_in = self.attend

    def attend(self, query, key, value, key_mask=None, scale=None, is_causal=False, return_lse=False, **call):
        from dma_diffusers.kernels.operator import Result

        self.calls.append((key, call))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
        p = scores.softmax(-1).nan_to_num()  # a query that sees nothing gives zeros
        return Result(p @ value, scores.logsumexp(-1) if return_lse else torch.empty(0), torch.empty(0))


def qkv(mean_of_keys: float = 0.0) -> list[torch.Tensor]:
    """q, k and v `[1, H, S, D]`; the keys of every eighth of the sequence have a mean of their own."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, HEADS, LENGTH, 32, generator=generator) for _ in range(3))
    means = torch.randn(1, HEADS, 8, 32, generator=generator).repeat_interleave(LENGTH // 8, 2)
    return [q, k + mean_of_keys * means, v]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def asked(**changed) -> dict:
    """The operator's arguments for one part."""
    from dma_diffusers.config import DMAConfig

    config = DMAConfig(**{"high": "bf16", "low": "int8", "min_length": 0, "lowering": "reference"} | changed)
    return config.arguments((0, 0)) | {"mapped": True, "masks_text": False}


def keys_have_means_of_their_own(world: World) -> dict:
    """int8 smooths keys by their mean, which differs between the chunks of a ring."""
    from dma_diffusers.kernels import operator

    q, k, v = qkv(mean_of_keys=3.0)
    spread, arguments = world.spread(), asked(policy="dense(everywhere=low)")
    parts = [world.part(x, 2) for x in (q, k, v)]
    found = world.whole(spread.attention(operator.attention, *parts, None, None, **arguments), 2)
    alone = operator.attention(q, k, v, **arguments).out
    exact = F.scaled_dot_product_attention(q, k, v)
    uncorrected = world.whole(spread.attention(_without_correction, *parts, None, None, **arguments), 2)
    return {
        "several": error(found, exact), "alone": error(alone, exact),
        "uncorrected": error(uncorrected, exact),
    }  # fmt: skip


def _without_correction(query, key, value, **arguments):
    """The operator, whose log-sum-exps are those of smoothed keys."""
    from dma_diffusers.kernels import operator

    result = operator.attention(query, key, value, **arguments)
    offset = (query @ key.mean(2, keepdim=True).mT)[..., 0] * query.shape[-1] ** -0.5
    return result._replace(lse=result.lse - offset) if result.lse.numel() else result


def masks_are_each_chunk_s_own(world: World) -> dict:
    """Keys are hidden at random, and all of one process's: its own queries see nothing of their own chunk."""
    q, k, v = qkv()
    mask = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[:, : LENGTH // world.size] = False
    parts = [world.part(x, 2) for x in (q, k, v)]
    exact = Exact(torch.nn.Module())
    found = world.spread().attention(exact.attend, *parts, world.part(mask, 1), None, **asked())
    expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    return {"error": error(world.whole(found, 2), expected)}


def heads_and_chunks_have_their_policies(world: World) -> dict:
    """Each head keeps its own window, the band is in the own chunk, and the sink is in the first."""
    exact = Exact(torch.nn.Module())
    arguments = asked(policy="diagonal(window=0/128/384/640, sink=256) | importance(budget=0.25)")
    arguments |= {"text_start": 0, "text_stop": 8}
    world.spread().attention(exact.attend, *(world.part(x, 2) for x in qkv()), None, None, **arguments)
    return {
        "policies": [call["policy"] for _, call in exact.calls],
        "texts": [(call["text_start"], call["text_stop"], call["parts"]) for _, call in exact.calls],
    }


def model_is_stock(name: str, enabled_first: bool) -> Callable[[World], dict]:
    def run(world: World) -> dict:
        """A model with exact attention over several processes is the model in one, and its text is where it is."""
        from dma_diffusers import apply, report

        torch.manual_seed(0)
        case = tiny(name)
        text, other = case.texts(2)
        stock = case.run(text)
        if enabled_first:
            case.model.enable_parallelism(config=world.config())
        apply(case.model, min_length=0, low="int8", high="bf16")
        if not enabled_first:
            case.model.enable_parallelism(config=world.config())
        exact = Exact(case.model)
        drawn = case.run(text)
        calls = list(exact.calls)
        case.run(other)
        keys, arguments = calls[0]  # of the first module, where nothing else knows of the text
        changed = (keys != exact.calls[len(calls)][0]).any(-1).any(1).any(0)
        said = torch.zeros_like(changed).view(arguments["parts"], -1)
        said[:, arguments["text_start"] : arguments["text_stop"]] = True
        receipt = report(case.model)
        return {
            "error": error(drawn, stock), "calls": len(calls), "text": torch.equal(changed, said.flatten()),
            "has_text": bool(changed.any()), "texts_agree": len({_text(call) for _, call in calls}) == 1,
            "intercepted": sum(module.intercepted for module in receipt.modules), "receipt": str(receipt),
            "expected": case.joint_calls + case.image_calls,
        }  # fmt: skip

    return run


def _text(call: dict) -> tuple[int, ...]:
    return call["text_start"], call["text_stop"], call["parts"]


def boxes_are_those_of_one_process(name: str, policy: str) -> Callable[[World], dict]:
    def run(world: World) -> dict:
        """On a grid, text has tiles of its own, so that tiles are the same ones whoever computes them."""
        from dma_diffusers import apply

        case = tiny(name)
        (text,) = case.texts(1)
        stock = case.run(text)
        options = {"min_length": 0, "low": "mxfp4", "high": "bf16", "policy": policy, "lowering": "reference"}
        apply(case.model, **options)
        alone = case.run(text)
        case.model.enable_parallelism(config=world.config())
        return {"several": error(case.run(text), alone), "low": error(alone, stock)}

    return run


def memories_are_those_of_one_process(world: World) -> dict:
    """Each process remembers its own heads' pairs, of tiles that are the same ones whoever computes them."""
    from dma_diffusers import apply, report

    case = tiny("flux")
    policy = "diagonal(window=0, sink=0, near=grid) | importance(budget=0.3, beyond=mean)"
    apply(case.model, min_length=0, high="bf16", low="bf16", policy=policy, lowering="reference")
    (text,) = case.texts(1)
    alone = three_steps(case, text)
    case.model.enable_parallelism(config=world.config())
    several = error(three_steps(case, text), alone)
    return {"several": several, "notes": [module.notes for module in report(case.model).modules]}


def three_steps(case, text: torch.Tensor) -> torch.Tensor:
    """Runs a model for three steps of a drawing, and gives its outputs; the second step has other latents."""
    steps = [
        case.call(text, case.latents * sign) | {"timestep": torch.full((1,), level)}
        for sign, level in ((1, 0.5), (-1, 0.45), (1, 0.4))
    ]
    return torch.stack([case.model(**call, return_dict=False)[0] for call in steps])


def chunks_have_memories_of_their_own(world: World) -> dict:
    """Each process finds the pairs of each of a ring's chunks, and remembers them."""
    from dma_diffusers import apply, report
    from dma_diffusers.kernels import operator

    case, genuine, calls = tiny("wan"), operator._attention, []
    case.latents = torch.randn(1, 16, 3, 32, 48)
    (text,) = case.texts(1)

    def attention(**asked):
        calls.append((asked["memory"], asked["memory"].is_read))
        return genuine(**asked)

    fields = {"min_length": 0, "high": "bf16", "low": "bf16", "lowering": "reference"}
    case.model.enable_parallelism(config=world.config())
    apply(case.model, policy="importance(budget=0.3, by=rows)", **fields)
    anew = three_steps(case, text)
    apply(case.model, policy="importance(budget=0.3)", **fields)
    with mock.patch.object(operator, "_attention", attention):
        found = three_steps(case, text)
    places = [calls[place :: len(calls) // 3] for place in range(len(calls) // 3)]  # of each call in a step
    return {
        "first step": error(found[0], anew[0]),
        "read": [[is_read for _, is_read in place] for place in places],
        "memories": [[id(memory) for memory, _ in place] for place in places],
        "notes": [module.notes for module in report(case.model).modules],
    }


def grids_are_refused(world: World) -> dict:
    """Applied before and after parallelism is enabled."""
    from dma_diffusers import apply

    said = []
    for enabled_first in (True, False):
        case = tiny("flux")

        def enable(case=case):
            case.model.enable_parallelism(config=world.config())

        def attach(case=case):
            apply(case.model, min_length=0, policy="neighborhood(window=4x4)", lowering="reference")

        try:
            for step in (enable, attach) if enabled_first else (attach, enable):
                step()
            case.run(case.texts(1)[0])
            said.append("")
        except ValueError as refusal:
            said.append(str(refusal))
    return {"said": said}


def restored_models_are_stock(world: World) -> dict:
    """Applied, parallel, restored; and restored, then parallel."""
    from dma_diffusers import apply, restore

    errors = []
    for enabled_first in (True, False):
        case = tiny("flux")
        (text,) = case.texts(1)
        stock = case.run(text)
        apply(case.model, min_length=0)
        if enabled_first:
            case.model.enable_parallelism(config=world.config())
            restore(case.model)
        else:
            restore(case.model)
            case.model.enable_parallelism(config=world.config())
        errors.append(error(case.run(text), stock))
    return {"errors": errors}


def fallbacks_are_stock(world: World) -> dict:
    """Calls that are too short, over Ulysses; over a ring, stock attention has nothing to offer here."""
    from dma_diffusers import apply, report

    case = tiny("flux")
    (text,) = case.texts(1)
    stock = case.run(text)
    apply(case.model, min_length=10_000)
    case.model.enable_parallelism(config=world.config())
    try:
        errors = [error(case.run(text), stock) for _ in range(2)]
    except ValueError as refusal:
        return {"said": str(refusal)}
    return {"errors": errors, "fallbacks": dict(report(case.model).modules[0].fallbacks)}


def lengths_are_all_processes(world: World) -> dict:
    """A call is as long as all its parts."""
    from dma_diffusers import apply, report

    case = tiny("flux")
    apply(case.model, min_length=300, lowering="reference")
    case.model.enable_parallelism(config=world.config())
    case.run(case.texts(1)[0])
    return {"intercepted": [module.intercepted for module in report(case.model).modules]}


def parts_of_different_lengths(world: World) -> dict:
    """`ulysses_anything` and `ring_anything`, with a number of tokens that the processes don't divide."""
    q, k, v = (x[:, :, : LENGTH - 1] for x in qkv())
    spread = world.spread(ulysses_anything=world.ulysses > 1, ring_anything=world.ring > 1)
    parts = [x.tensor_split(world.size, 2)[world.rank] for x in (q, k, v)]
    exact = Exact(torch.nn.Module())
    found = spread.attention(
        exact.attend, *parts, None, None, **asked(policy="diagonal(window=0/0/128/128, sink=0)")
    )
    expected = F.scaled_dot_product_attention(q, k, v).tensor_split(world.size, 2)[world.rank]
    return {
        "error": error(found, expected), "policies": [call["policy"] for _, call in exact.calls],
        "reasons": [spread.why_stock(q, k, None, text) for text in ((0, 0), (0, 8))],
    }  # fmt: skip


def heads_must_be_divided(world: World) -> dict:
    q, k, _ = (x[:, :3] for x in qkv())
    try:
        world.spread().why_stock(q, k, None, (0, 0))
    except ValueError as refusal:
        return {"said": str(refusal)}
    return {"said": ""}


def masks_of_all_tokens_are_refused(world: World) -> dict:
    """FLUX's plan splits no mask: stock attention would read it in the order of one process."""
    from dma_diffusers import apply

    case = tiny("flux")
    apply(case.model, min_length=0)
    case.model.enable_parallelism(config=world.config())
    mask = torch.ones(1, 1, 1, TEXT + case.tokens, dtype=torch.bool)
    case.inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    try:
        case.run(case.texts(1)[0])
    except ValueError as refusal:
        return {"said": str(refusal)}
    return {"said": ""}


def compiled_is_eager(fullgraph: bool) -> Callable[[World], dict]:
    def run(world: World) -> dict:
        from dma_diffusers import apply

        case = tiny("flux")
        (text,) = case.texts(1)
        stock = case.run(text)
        apply(case.model, min_length=0, low="mxfp4", high="bf16", window=(0, 128), lowering="reference")
        case.model.enable_parallelism(config=world.config())
        eager = case.run(text)
        case.model = torch.compile(case.model, backend="eager", fullgraph=fullgraph)
        return {"compiled": error(case.run(text), eager), "low": error(eager, stock)}

    return run


def backends_without_parallelism_are_refused(world: World) -> dict:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    from dma_diffusers import apply

    case = tiny("flux")
    apply(case.model, min_length=10_000)
    case.model.set_attention_backend("flex")
    case.model.enable_parallelism(config=world.config())
    try:
        case.run(case.texts(1)[0])
    except ValueError as refusal:
        return {"said": str(refusal)}
    finally:  # it was set for the whole process, too
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    return {"said": ""}


def guarded(world: World) -> dict:
    """The operator fails in the first process alone, first for the asked policy, then also for every tile HIGH."""
    from dma_diffusers import apply, report
    from dma_diffusers.kernels import operator

    genuine, found = operator._attention, {}
    for fault in ("asked", "high"):

        def attention(fault=fault, **asked):
            out, *others = genuine(**asked)
            if world.rank == 0 and (fault == "high" or asked["policies"] != [operator.DENSE]):
                out.fill_(torch.nan)
            return out, *others

        case = tiny("flux")
        apply(case.model, min_length=0, guard=0.5, lowering="reference")
        case.model.enable_parallelism(config=world.config())
        with mock.patch.object(operator, "_attention", attention):
            drawn, modules = case.run(case.texts(1)[0]), report(case.model).modules
        found[fault] = {
            "finite": bool(drawn.isfinite().all()), "calls": sum(module.intercepted for module in modules),
            "turned": sorted({words.split(": ")[-1] for module in modules for words in module.turned}),
        }  # fmt: skip
    return found


MODELS = ("flux", "flux2", "qwen", "wan", "ltx")
GRIDS = {
    "flux, neighborhood": ("flux", "neighborhood(window=8x10, high=3x3)"),
    "flux, boxes nearby": ("flux", "diagonal(window=128, sink=0, near=grid)"),
    "qwen, neighborhood": ("qwen", "neighborhood(window=10x10)"),
    "wan, neighborhood": ("wan", "neighborhood(window=3x6x6, high=1x3x3)"),
}
CASES: dict[str, Callable[[World], dict]] = {
    function.__name__: function
    for function in (
        keys_have_means_of_their_own, masks_are_each_chunk_s_own, heads_and_chunks_have_their_policies,
        memories_are_those_of_one_process, chunks_have_memories_of_their_own, grids_are_refused,
        restored_models_are_stock, fallbacks_are_stock, lengths_are_all_processes, parts_of_different_lengths,
        heads_must_be_divided, masks_of_all_tokens_are_refused, backends_without_parallelism_are_refused, guarded,
    )
}  # fmt: skip
CASES |= {f"stock: {name}": model_is_stock(name, number % 2 == 0) for number, name in enumerate(MODELS)}
CASES |= {f"boxes: {name}": boxes_are_those_of_one_process(*case) for name, case in GRIDS.items()}
CASES |= {"compiled": compiled_is_eager(True), "compiled in pieces": compiled_is_eager(False)}


def _process(rank: int, degrees: tuple[int, int], names: tuple[str, ...], folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(degrees[0] * degrees[1]), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{folder}/store", degrees[0] * degrees[1])
    dist.init_process_group(
        "cpu:gloo",
        store=store,
        rank=rank,
        world_size=degrees[0] * degrees[1],
        timeout=timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # Diffusers divides by it
    world, found = World(*degrees), {}
    with torch.no_grad():
        for name in names:
            try:
                found[name] = CASES[name](world)
            except Exception as failure:
                found[name] = {"error": f"{type(failure).__name__}: {failure}"}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()
    gc.collect()  # as `eval.bench.parallel.processes` does, and for its reason


@cache
def results(degrees: tuple[int, int], names: tuple[str, ...] = tuple(CASES)) -> list[dict[str, dict]]:
    """The results of all cases in each process. degrees: of ring and of Ulysses."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (degrees, names, folder), nprocs=degrees[0] * degrees[1])
        return [torch.load(f"{folder}/{rank}") for rank in range(degrees[0] * degrees[1])]
