"""Seconds of a run of cifar_fast.py and of airbench94_muon.py on a CPU, from timed steps:
python turns.py DTYPE DATA OURS THEIRS ROUNDS

DTYPE is float32 or bfloat16, DATA holds CIFAR10.pt, OURS and THEIRS are the paths of the two scripts. Each round runs
them in processes of their own, in turn, the C library told to keep freed memory. airbench94_muon is as published, but
on the CPU, in DTYPE instead of float16, and without its compiler. The first steps of each kind touch new memory and are
dropped: two to six. A run is the sum of what it consists of. A line of JSON for each process.
"""
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time

def seconds(function, times, dropped):
    """The median of a few calls, after some that do not count."""
    taken = []
    for number in range(times + dropped):
        start = time.perf_counter()
        function()
        if number >= dropped:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)

def ours(dtype, data_dir, path):
    import torch
    sys.argv = [path]
    script = runpy.run_path(path, run_name='script')
    script['override']([f'data.dir={data_dir}'])
    functions = []
    script['build'].__globals__['capture'] = lambda function, *rest: functions.append(function) or function
    cpu = torch.device('cpu')
    data = script['load_data'](cpu)
    script['build'](data, cpu, torch.bfloat16 if dtype == 'bfloat16' else None)
    small_step, large_step, test = functions
    opt = script['hyp']['opt']
    steps = round(opt['epochs'] * 50_000 / opt['batch_size'])
    small_steps = math.ceil(opt['small_share'] * steps)
    part = {'small_step': seconds(small_step, 9, 4), 'large_step': seconds(large_step, 9, 6), 'test': seconds(test, 1, 1)}
    run = small_steps * part['small_step'] + (steps - small_steps) * part['large_step'] + part['test']
    return {**part, 'run': run, 'steps': [small_steps, steps - small_steps]}

def theirs(dtype, data_dir, path):
    import torch
    source = open(path).read()
    for old, new in (('@torch.compile\n', ''), ('torch.device("cuda")', 'torch.device("cpu")'), ('.half()', f'.to(torch.{dtype})')):
        assert old in source
        source = source.replace(old, new)
    names = {'__name__': 'airbench'}
    data = torch.load(f'{data_dir}/CIFAR10.pt')
    with tempfile.TemporaryDirectory() as folder:
        for part in ('train', 'test'):
            images = data[part]['images'].permute(0, 2, 3, 1)
            torch.save({'images': images, 'labels': data[part]['labels'], 'classes': data['classes']}, f'{folder}/{part}.pt')
        sys.argv = [path]
        exec(compile(source, path, 'exec'), names)
        train = names['CifarLoader'](folder, train=True, batch_size=2000, aug={'flip': True, 'translate': 2})
        test = names['CifarLoader'](folder, train=False, batch_size=2000)
    test.images, test.labels = test.images[:2000], test.labels[:2000]
    net = names['CifarNet']().to(memory_format=torch.channels_last)
    net.reset()
    whiten = seconds(lambda: net.init_whiten(train.normalize(train.images[:5000])), 1, 0)
    filters = [weight for weight in net.parameters() if weight.ndim == 4 and weight.requires_grad]
    rest = [weight for weight in net.parameters() if weight.ndim != 4 and weight.requires_grad]
    optimizers = [torch.optim.SGD(rest, lr=0.05, momentum=0.85, nesterov=True, fused=True),
                  names['Muon'](filters, lr=0.24, momentum=0.6, nesterov=True)]
    batches = iter(train)
    first_pass = seconds(lambda: next(batches), 1, 0)
    batches = iter(train)
    next_pass = seconds(lambda: next(batches), 1, 0)  # flips and moves all images, then takes the first batch

    def step(bias):
        inputs, labels = next(batches)
        outputs = net(inputs, whiten_bias_grad=bias)
        torch.nn.functional.cross_entropy(outputs, labels, label_smoothing=0.2, reduction='sum').backward()
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad(set_to_none=True)

    net.train()
    part = {'passes': first_pass + 7 * next_pass, 'whiten': whiten, 'step_with_bias': seconds(lambda: step(True), 6, 4),
            'step': seconds(lambda: step(False), 6, 2)}
    part['test'] = 5 * seconds(lambda: names['evaluate'](net, test, tta_level=2), 1, 1)
    return {**part, 'run': sum((part['passes'], part['whiten'], 75 * part['step_with_bias'], 125 * part['step'], part['test']))}

program, *rest = sys.argv[1:]
if program in ('ours', 'theirs'):
    result = {'ours': ours, 'theirs': theirs}[program](*rest)
    print(json.dumps({'program': program, **{key: round(value, 3) if isinstance(value, float) else value
                                                 for key, value in result.items()}}))
else:
    dtype, data_dir, our_path, their_path, rounds = program, *rest
    kept = {**os.environ, 'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**31 - 1)}
    for _ in range(int(rounds)):
        for program, path in (('ours', our_path), ('theirs', their_path)):
            result = subprocess.run([sys.executable, __file__, program, dtype, data_dir, path], env=kept, check=True,
                                    stdout=subprocess.PIPE, text=True)
            print(result.stdout.splitlines()[-1], flush=True)
