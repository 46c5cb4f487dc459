"""How fast images are read compared with the decoder alone, and what the latent cache costs: time, bytes, memory.

python tests/benchmarks/bench_data.py                           all parts; the cache is built with a tiny VAE
python tests/benchmarks/bench_data.py --only build --vae sd     the cache, with a VAE of Stable Diffusion's size
"""

import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import made_data
from peers import randomize

from minildm.config import VAEConfig
from minildm.data import cache, screening
from minildm.data.open import open_data_set
from minildm.data.reading import Transform, read
from minildm.data.records import Record
from minildm.data.sets import padchest
from minildm.settings import Parser
from minildm.vae import VAE


def radiograph(width, height, bits, seed=0):
    """Smooth shapes and detector noise, which compress about as well as a radiograph."""
    rng = np.random.default_rng(seed)
    smooth = np.asarray(
        Image.fromarray(made_data.grey_image(seed, 128)).resize((width, height), Image.Resampling.BICUBIC)
    )
    values = smooth * (2.0**bits / 300) + rng.normal(0, 2.0**bits / 400, (height, width))
    return values.clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)


def make_files(folder):
    """{format: paths of 6 images} for the file formats that publishers use."""
    kinds = {
        "PNG 8 bits 1024 x 1024 (NIH)": (1024, 1024, 8, "png"),
        "PNG 16 bits 2140 x 1760 (PadChest)": (2140, 1760, 16, "png"),
        "JPEG 2544 x 3056 (MIMIC-CXR)": (2544, 3056, 8, "jpg"),
        "JPEG 300 x 300 colour (PatchGastric)": (300, 300, 8, "jpeg"),
        "DICOM 12 bits 2140 x 1760, window": (2140, 1760, 12, "dcm"),
    }
    files = {}
    for name, (width, height, bits, suffix) in kinds.items():
        for seed in range(6):
            path = folder / f"{suffix}{width}-{seed}.{suffix}"
            pixels = radiograph(width, height, bits, seed)
            if suffix == "dcm":
                path.write_bytes(made_data.dicom(pixels, 12, WindowCenter=2047, WindowWidth=4095))
            elif suffix == "jpeg":
                Image.merge("RGB", [Image.fromarray(radiograph(width, height, 8, s)) for s in (seed, 7, 8)]).save(path)
            else:
                Image.fromarray(pixels).save(path, **({"quality": 95} if suffix == "jpg" else {}))
            files.setdefault(name, []).append(path)
    return files


def decode_only(path):
    """The decoder alone."""
    if path.suffix == ".dcm":
        import pydicom

        return pydicom.dcmread(path).pixel_array
    with Image.open(path) as image:
        image.load()


def rate(function, arguments, seconds=1.0, pool=None):
    """Calls per second, after one round to warm up.

    Counts processor time, which other work on the machine does not change; with a pool of threads, wall-clock time.
    """
    clock = time.perf_counter if pool else time.process_time
    list(map(function, arguments))
    start, count = clock(), 0
    while clock() - start < seconds:
        list((pool.map if pool else map)(function, arguments))
        count += len(arguments)
    return count / (clock() - start)


def bench_reading(folder, threads):
    print("images per second of processor time; minildm: file -> SHA-256, 8 bits, 512 px square, three channels")
    print(f"{'':38}{'decoder alone':>14}{'minildm':>10}{'ratio':>7}{f'{threads} threads':>12}{'224 px':>9}")
    for name, paths in make_files(folder).items():
        records = [Record(path.name, "p", path=path) for path in paths]
        alone = rate(decode_only, paths)
        ours = rate(lambda record: read(record, Transform(512)), records)
        small = rate(lambda record: read(record, Transform(224)), records)
        with ThreadPoolExecutor(threads) as pool:
            threaded = rate(lambda record: read(record, Transform(512)), records, pool=pool)
        print(f"{name:38}{alone:14.1f}{ours:10.1f}{ours / alone:7.2f}{threaded:12.1f}{small:9.1f}")


def bench_table(folder, rows=160_861):
    """Read a table as long as PadChest's."""
    root = made_data.padchest(folder, images=False)
    table = next(root.glob("*.csv"))
    header, first, *_ = table.read_text().splitlines()
    with open(table, "w") as file:
        file.write(header + "\n")
        for i in range(rows):
            file.write(first.replace("a_1.png", f"{i}.png").replace(",7,", f",{i // 2},") + "\n")
    start = time.perf_counter()
    records, _ = padchest.records(root)
    print(
        f"PadChest's table, {rows:,} rows: {time.perf_counter() - start:.1f} s, resident "
        f"{memory():.0f} MB; {len(records):,} records"
    )


def bench_rows(folder, count=160_000):
    """Look-ups among as many rows as PadChest needs. The rows are small: their number counts here."""
    rng = np.random.default_rng(0)
    rows = cache.Rows(folder, "bench", (8, 4, 4))
    before = memory()
    keys = [rng.bytes(32) for _ in range(count)]
    refresh, cache.Rows.refresh = cache.Rows.refresh, lambda self: None  # write only
    for start in range(0, count, cache.ROWS_PER_SHARD):
        rows.add(keys[start : start + cache.ROWS_PER_SHARD], torch.zeros(cache.ROWS_PER_SHARD, 8, 4, 4))
    cache.Rows.refresh = refresh
    start = time.perf_counter()
    rows = cache.Rows(folder, "bench", (8, 4, 4))
    opened = time.perf_counter() - start
    order = rng.permutation(count)[:20_000]
    start = time.perf_counter()
    for i in order:
        rows[keys[i]]
    print(
        f"{count:,} rows in {len(rows.shards):,} shards: opened in {opened:.2f} s, a random row in "
        f"{(time.perf_counter() - start) / len(order) * 1e6:.0f} us, resident memory + {memory() - before:.0f} MB, "
        f"files held open {len(list(Path('/proc/self/fd').iterdir()))}"
    )


def bench_duplicates(count=160_000):
    """Random hashes with the bit statistics of real chest X-rays: 80 % of the bits follow a common pattern."""
    rng = np.random.default_rng(0)
    pattern = rng.random((1, 256)) < 0.5
    hashes = np.packbits(pattern ^ (rng.random((count, 256)) < 0.2), axis=1)
    start = time.perf_counter()
    for _ in screening.near_hashes(hashes):
        pass
    print(f"near-duplicates among {count:,} hashes: {time.perf_counter() - start:.0f} s")


def bench_build(folder, config, count, size, device, dtype, threads, batch_size):
    """Build a cache of ``count`` images like PadChest's."""
    data = folder / "build"
    for seed in range(count):
        path = data / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(radiograph(2140, 1760, 16, seed)).save(path)
    data_set = open_data_set(f"folder:{data}")
    vae = randomize(VAE(config)).to(device, dtype).eval()
    start = time.perf_counter()
    digest = cache.weights_fingerprint(vae)
    print(f"fingerprint of the VAE's weights ({digest[:8]}): {time.perf_counter() - start:.2f} s")
    with torch.no_grad():
        vae.encode(torch.zeros(batch_size, 3, size, size, device=device, dtype=dtype))  # warm up
    before, start, worked = memory(), time.perf_counter(), time.process_time()
    latents = cache.latent_cache(data_set.records, Transform(size), vae, folder / "cache", batch_size, threads)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    stored = sum(path.stat().st_size for path in latents.rows.folder.glob("*.safetensors")) / count
    print(
        f"cache at {size} px on {device} ({dtype}), {threads} threads, batches of {batch_size}: "
        f"{seconds / count * 1000:.0f} s per 1,000 images (processor time {worked / count * 1000:.0f} s); "
        f"{stored:,.0f} bytes each on disk; memory + "
        f"{memory() - before:.0f} MB; 160,000 images: {seconds / count * 160_000 / 3600:.1f} h, "
        f"{stored * 160_000 / 1e9:.1f} GB"
    )
    start = time.perf_counter()
    cache.latent_cache(data_set.records, Transform(size), vae, folder / "cache", batch_size, threads)
    print(f"opened again: {time.perf_counter() - start:.2f} s")


def memory():
    """Resident memory of this process in MB (10^6 bytes)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("reading", "table", "rows", "duplicates", "build"))
    parser.add_argument("--vae", default="tiny", choices=("tiny", "sd"))
    parser.add_argument("--images", type=int, default=64, help="number of images in the cache that is built")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.only is None:  # each part in its own process, so that its memory is counted from a clean start
        for part in ("reading", "table", "rows", "duplicates", "build"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", part], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.only == "reading":
            bench_reading(folder, arguments.threads)
        elif arguments.only == "table":
            bench_table(folder)
        elif arguments.only == "rows":
            bench_rows(folder)
        elif arguments.only == "duplicates":
            bench_duplicates()
        else:
            config = VAEConfig() if arguments.vae == "sd" else VAEConfig.tiny()
            bench_build(
                folder,
                config,
                arguments.images,
                arguments.size,
                arguments.device,
                getattr(torch, arguments.dtype),
                arguments.threads,
                arguments.batch_size,
            )


if __name__ == "__main__":
    main()
