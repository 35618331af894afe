"""Programs in turn, in one process, two threads: python turns.py FOLDER_OF_OLD FOLDER_OF_NEW ROUNDS > turns.jsonl"""
import json, statistics, sys, time, importlib.util
import torch
def load(path, *arguments):
    names = {'__name__': 'script', '__file__': path}
    exec(compile(open(path).read(), path, 'exec'), names)
    names['override'](list(arguments))
    return names
def program(path, dtype, *arguments):
    names = load(path, *arguments)
    cpu = torch.device('cpu')
    data = names['load_data'](cpu)
    train = names['build'](data, cpu, dtype)[0]
    def main(seed):
        start = time.perf_counter()
        result, _ = train(seed)
        acc = result.tolist()[0]
        return {'acc': round(acc, 4), 'time_s': round(time.perf_counter() - start, 4)}
    return main, data
old, new, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
half = torch.bfloat16
programs = {}
programs['new float32'], data = program(f'{new}/mnist_fast.py', None)
programs['new bfloat16'], _ = program(f'{new}/mnist_fast.py', half)
programs['before float32'], _ = program(f'{old}/mnist_fast.py', None)
programs['before bfloat16'], _ = program(f'{old}/mnist_fast.py', half)
spec = importlib.util.spec_from_file_location('stage8', 'stage8.py'); module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
def prepared(part):
    return (part['images'].float() / 255 - 0.1307) / 0.3081, part['labels']
main = module.make(*prepared(data['train']), *prepared(data['test']))
programs['stage 8'] = lambda seed: {key: value for key, value in main(seed).items() if key in ('acc', 'time_s')}
if len(sys.argv) > 4:
    long = 'opt.lr=0.1', 'aug.shift=2', 'net.crop=24', 'net.widths=(32,64,128)'
    programs['recipe of 5 epochs, before, float32'], _ = program(f'{old}/mnist_fast.py', None, 'opt.epochs=5', *long)
    programs['recipe now, bfloat16'], _ = program(f'{new}/mnist_fast.py', half, *sys.argv[4:])
for turn in range(rounds):
    for name, run in programs.items():
        for again in range(1 if 'stage' in name or 'recipe' in name else 3):
            print(json.dumps({'program': name, 'turn': turn, **run(1000 + turn)}), flush=True)
