# Every recipe makes the virtual environment it needs by itself; `just` alone lists them.

python := ".venv/bin/python"

# list the recipes
[private]
default:
    @{{ just_executable() }} --list --unsorted

# make .venv with the pinned versions, only when it is missing or its inputs changed
setup:
    @bash .ci/setup

# run the everyday test suite, a process per core with one thread each: just test tests/core/test_checkpoint.py -n 0 runs one file in one
test *args: setup
    OMP_NUM_THREADS=1 {{ python }} -m pytest -q -n logical --maxprocesses 4 --dist worksteal {{ args }}

# run every test, also those marked `long` (tests/oracles/kinds.py): every variant where the everyday suite takes one of its kind
test-long *args:
    @{{ just_executable() }} test -m '"long or not long"' {{ args }}

# format, lint, types, generated tables, tests
check: setup
    {{ python }} -m ruff format --check .
    {{ python }} -m ruff check .
    {{ python }} -m pyright
    {{ python }} -m benchmarks.table --check
    @{{ just_executable() }} test

# adapt a real model with one variant: just bench-variant lora r=4 steps=100 seeds=0,1,2
bench-variant name *options: setup
    @{{ python }} -m benchmarks {{ name }} {{ options }}

# full fine-tuning on the same data and steps, the record that the variants stand beside
bench-full: setup
    @{{ python }} -m benchmarks.embedded.full

# steer the embedded base by one direction from labelled text, both ways, with its harm and controls: just steering windows=64
steering *options: setup
    @{{ python }} -m benchmarks.steering {{ options }}

# fine-tune a small time-series transformer with and without the attention barrier: just forecast tasks=elnino seeds=0,1
forecast *options: setup
    @{{ python }} -m benchmarks.forecast {{ options }}

# time, memory and attach of every variant beside the bare model and PEFT: just bench-cost variants=lora,dora models=d512
bench-cost *options: setup
    @{{ python }} -m benchmarks.cost {{ options }}

# what each objective adds to a training step, in CPU time: just bench-objectives rounds=9
bench-objectives *options: setup
    @{{ python }} -m benchmarks.cost.objectives {{ options }}

# one adapter on tasks that follow one another, beside plain lora: just bench-sequential lora objective=gossip:5 seeds=0,1,2
bench-sequential *words: setup
    @{{ python }} -m benchmarks.sequential {{ words }}

# make the committed records of bench-sequential anew: just sequential-records conflict
sequential-records *names: setup
    @{{ python }} -m benchmarks.sequential.records {{ names }}

# run every variant through merge, export, quantised bases, compile and two processes: the record of docs/compatibility.md
compatibility *options: setup
    @{{ python }} -m benchmarks.compatibility {{ options }}

# run the conformance suite on one variant
contract name: setup
    @{{ python }} -m lora_lite check {{ name }}

# write a variant file, its test and its review page from templates
new-variant name: setup
    @{{ python }} -m lora_lite new {{ name }}
    @{{ python }} -m benchmarks.table

# write what is generated in README.md and docs from the registry and the committed records: just table --check only looks
table *options: setup
    @{{ python }} -m benchmarks.table {{ options }}

# sweep learning rates on the embedded benchmark: just sweep lora hra (none: every variant)
sweep *names: setup
    @{{ python }} -m benchmarks.embedded.sweep {{ names }}

# pretrain the small forecasting model again (seconds)
pretrain-forecaster: setup
    @{{ python }} -m benchmarks.forecast.base

# pretrain the small model of bench-sequential again (half a minute)
pretrain-tier: setup
    @{{ python }} -m benchmarks.sequential.model

# pretrain the embedded base again (about 35 minutes on two cores)
pretrain-base: setup
    @{{ python }} -m benchmarks.embedded.pretrain
