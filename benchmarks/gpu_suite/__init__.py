"""Everything worth knowing from a borrowed GPU, most valuable first.

    python -m benchmarks.gpu_suite --out FOLDER [--resume FOLDER] [--minutes 9.2] [--only STAGE ...]
    python -m benchmarks.gpu_suite --out FOLDER --dali

| stage | what | took (s) | budget (s) |
|---|---|---|---|
| ceilings | versions, free memory; copy, 8192^3, SiT-XL/2's products in bf16 and FP8 | 16 | 60 |
| correct | every operation at SiT-XL/2's shapes against float64, by the tests' rule | 21 | 100 |
| rows | row kernels by graph replay: share of copy; other rows of launch tables | 46 | 110 |
| step | ours, SiT-XL/2 at batch 256 or what fits: 10 steps, then kernels and gaps | 44 | 220 |
| rivals | plain+compile, reference, eager, eager+compile | (300) | 560 |
| others | ours with CUDA graphs; DINOv2 beside the generator; SiT-B/2 | (330) | 480 |
| tests | the kernel tests on the device, 8 processes | 95 | 150 |
| operations | every operation against its rivals at SiT-XL/2, batch 256 | 62 | 240 |
| dali | only with `--dali`: decoding on the GPU and the CPU, and a step fed by it | (60) | 150 |

Times are those of one H200 and 16 cores; in brackets, estimates. A first call of ten minutes ends
among the rivals, a second one with `--resume` does the rest.

A stage runs in a process of its own, which is killed alone when it, or one of its items, takes
longer than it may, and started again for the items that are left. Each item's records are on the
disk as soon as they are known; what fails is a record with all that it said. Files in FOLDER:
suite.jsonl (records), table.txt, log.txt (what everything said), profile.json, tests.xml and
tests-alone.xml (JUnit).
`--resume` takes in what was recorded for this commit and device, and does not repeat it. An item
that would not end in the time left is left out for a later call.
"""
