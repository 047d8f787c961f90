"""The pictures and clips of all rows are written under the names by which benchmarks read them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.clip import encode_clip
from dma_diffusers.pipelines.files import write_atomically

BENCHMARKS = {"vbench": "clips", "t2i-compbench": "pictures"}
_LONGEST = 255  # bytes of a file's name


def check(benchmark: str, video: bool) -> None:
    """Raise ValueError for a benchmark that is not known, and for one that reads what is not drawn."""
    drawn = "clips" if video else "pictures"
    if benchmark not in BENCHMARKS:
        raise ValueError(f"--samples-for {benchmark}: there are {', '.join(BENCHMARKS)}")
    if BENCHMARKS[benchmark] != drawn:
        raise ValueError(f"{benchmark} reads {BENCHMARKS[benchmark]}, and this model draws {drawn}")


def write_samples(
    rows: Mapping[str, Pictures], batches: Sequence[Sequence[Sample]], seeds: int, folder: Path, fps: float
) -> list[str]:
    """Write every row's samples into a folder of its own under `folder`, and return what a reader has to know.

    Clips are `{prompt}-{i}.mp4`, i counting a prompt's seeds, as VBench (https://github.com/Vchitect/VBench) reads
    them. Pictures are `samples/{prompt}_{n:06}.png`, n counting all, as T2I-CompBench
    (https://github.com/Karine-Huang/T2I-CompBench) reads them in its --out_dir. Both read the prompt from the name, so
    that a prompt that cannot be a name is left out. They are H.264 in .mp4 at `fps`, and exact in .png.
    """
    samples = [sample for batch in batches for sample in batch]
    left_out: set[str] = set()
    for pictures in rows.values():
        for number, sample in enumerate(samples):
            frames = pictures.frames(sample)
            text = sample.prompt.text
            name = f"{text}-{number % seeds}.mp4" if len(frames) > 1 else f"{text}_{number:06}.png"
            if "/" in text or len(name.encode()) > _LONGEST:
                left_out.add(text)
                continue
            of_row = folder / pictures.folder.name / ("" if len(frames) > 1 else "samples")
            of_row.mkdir(parents=True, exist_ok=True)
            if len(frames) > 1:
                write_atomically(of_row / name, encode_clip(frames.permute(0, 2, 3, 1).numpy(), fps, "mp4"))
            else:
                write_atomically(of_row / name, pictures.file(sample).read_bytes())
    if not left_out:
        return []
    return [
        f"{len(left_out)} prompts cannot be names of files and have no samples, such as {min(left_out)!r:.80}"
    ]
