"""Tests of the scripts as a user meets them: python -m pytest. No network; real MNIST is used where DATA_DIR has it."""
import functools, gzip, hashlib, http.server, importlib.util, io, itertools, json, math, os, pickle, re, shutil, signal
import socket, statistics, struct, subprocess, sys, tarfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
REAL_DATA = Path(os.environ.get('DATA_DIR', 'data')).resolve()
SYNTHETIC = 'data.name=Synthetic', 'run.device=cpu', 'run.log=log.jsonl'

# What each subprocess loads first. It lets nobody look up another address than this machine's, sets attributes of
# torchvision's classes as TORCHVISION says, and ends a process that imports torchvision without that variable.
SITECUSTOMIZE = '''
import importlib.machinery, json, os, resource, sys

def guard(event, arguments):
    if event == 'socket.getaddrinfo' and arguments[0] not in ('127.0.0.1', 'localhost'):
        raise OSError(f'no test goes to {arguments[0]}')

class Finder:
    def find_spec(name, path=None, target=None):
        if name == 'torchvision' and 'TORCHVISION' not in os.environ:
            print('torchvision was imported', file=sys.stderr, flush=True)
            os._exit(9)
        if name in ('torchvision.datasets.mnist', 'torchvision.datasets.cifar'):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module
            def exec_module(module):
                execute(module)
                classes = json.loads(os.environ['TORCHVISION'])
                for kind in set(classes) & set(dir(module)):
                    for key, value in classes[kind].items():
                        setattr(getattr(module, kind), key, value)
            spec.loader.exec_module = exec_module
            return spec

sys.addaudithook(guard)
sys.meta_path.insert(0, Finder)
if 'LARGEST_FILE' in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['LARGEST_FILE']),) * 2)
'''

@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'sets').mkdir()
    return tmp_path

def prepare():
    """A shell's background job is born deaf to SIGINT, and so would be its children. Two processes share two cores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

def start(folder, *arguments, script='mnist_fast.py', launcher=(), **variables):
    """A process of a script, or of other Python source, that works in folder and has its data in folder/sets."""
    (folder / 'site').mkdir(exist_ok=True)
    (folder / 'site/sitecustomize.py').write_text(SITECUSTOMIZE)
    env = os.environ | {'PYTHONPATH': str(folder / 'site'), 'DATA_DIR': str(folder / 'sets'), 'no_proxy': '*'}
    env = {'OMP_NUM_THREADS': '1'} | env  # with more, small networks crawl where another program has a core
    return subprocess.Popen([sys.executable, *launcher, HERE / script, *arguments], cwd=folder, env=env | variables,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare)

def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and 'Traceback' not in out + err, out + err
    return out, err

def run(folder, *arguments, **variables):
    """A run that ends well -> its stdout."""
    return finish(start(folder, *arguments, **variables))[0]

def fail(folder, *arguments, status=1, **variables):
    """A run that ends before training -> its one line on stderr."""
    out, err = finish(start(folder, *arguments, **variables), status)
    assert err.count('\n') == 1 and err.endswith('\n'), err
    assert 'summary' not in out and not re.search(r'^ +0 +\d', out, re.M), out
    return err

def fail_each(folder, cases, status=1):
    """As fail, for several lists of arguments, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda arguments: fail(folder, *arguments, status=status), cases))

def summary(text):
    """The summary, which is the last line -> a dict."""
    keys, number = ('acc', 'std', 'ci99', 'time_s', 'target'), r'(\d+\.\d+|nan)'
    form = r'summary  script=(\w+)  runs=(\d+)  ' + '  '.join(f'{key}={number}' for key in keys) + '  met=(yes|no|open)'
    script, runs, *numbers, met = re.fullmatch(form, text.splitlines()[-1]).groups()
    return {'script': script, 'runs': int(runs), **dict(zip(keys, map(float, numbers))), 'met': met}

def read_log(path):
    """-> headers, run lines"""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]  # NaN is not JSON
    return [line for line in lines if 'hyp' in line], [line for line in lines if 'acc' in line]

# A network that a core trains in seconds, on generated images.
SMALL = *SYNTHETIC, 'net.widths=(8,16,16)', 'opt.epochs=2', 'opt.batch_size=250'

def make_set(labels, test_labels):
    """A data file's content: three classes, each a pattern of 7 x 7 fields that a network soon tells from the rest."""
    patterns = F.interpolate(torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(1)), scale_factor=4)
    def images(labels):
        return (40 + 160 * patterns[labels] + 50 * torch.rand(len(labels), 1, 28, 28)).byte()
    return {'train': {'images': images(labels), 'labels': labels}, 'classes': ['ant', 'bee', 'cat'],
            'test': {'images': images(test_labels), 'labels': test_labels}}

def torchvision_with(**classes):
    """A variable that lets a process import torchvision, whose classes get these attributes."""
    return {'TORCHVISION': json.dumps(classes)}

@functools.cache
def internals(script='mnist_fast'):
    names = {'__name__': script, '__file__': str(HERE / f'{script}.py')}
    exec((HERE / f'{script}.py').read_text(), names)
    return names

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two runs on generated images -> their stdout, their log's text, its header, its run lines."""
    folder = tmp_path_factory.mktemp('finished')
    out = run(folder, *SYNTHETIC, 'run.runs=2', 'run.seed=7')
    (header,), lines = read_log(folder / 'log.jsonl')
    return out, (folder / 'log.jsonl').read_text(), header, lines

def test_a_run_learns_and_says_so(finished):
    out, _, header, lines = finished
    result = summary(out)
    assert (result['script'], result['runs'], result['target']) == ('mnist_fast', 2, header['hyp']['run']['target'])
    assert result['acc'] > 0.5  # chance is 0.1
    assert abs(result['acc'] - (lines[0]['acc'] + lines[1]['acc']) / 2) < 2e-5
    assert abs(result['time_s'] - (lines[0]['time_s'] + lines[1]['time_s']) / 2) < 2e-3
    assert len(re.findall(r'^ +[01] +[78] ', out, re.M)) == 2  # the table

def test_the_log(finished):
    _, text, header, lines = finished
    assert [json.loads(line) for line in text.splitlines()] == [header, *lines]
    assert set(header) == {'session', 'script', 'code', 'hyp', 'device', 'torch', 'threads', 'command'}
    assert header['script'] == 'mnist_fast' and header['code'] == (HERE / 'mnist_fast.py').read_text()
    assert (header['device'], header['torch']) == ('cpu', torch.__version__)
    assert type(header['threads']) is int and all(argument in header['command'] for argument in SYNTHETIC)
    assert header['hyp']['data']['name'] == 'Synthetic' and [line['seed'] for line in lines] == [7, 8]
    for line in lines:
        assert set(line) == {'session', 'seed', 'acc', 'acc_plain', 'loss', 'time_s', 'total_s', 'steps', 'curve'}
        assert line['session'] == header['session']
        assert 0.5 < line['acc'] <= 1 and 0.5 < line['acc_plain'] <= 1 and 0 < line['loss'] < 2.3
        assert 0 < line['time_s'] < line['total_s'] < 300
        steps, losses = zip(*line['curve'])
        assert {type(step) for step in (*steps, line['steps'])} == {int} and {type(loss) for loss in losses} == {float}
        assert 1 <= steps[0] and steps[-1] <= line['steps'] and list(steps) == sorted(set(steps)) and len(steps) > 2
        assert losses[0] > losses[-1]

def test_a_seed_gives_a_result_to_the_last_bit(finished, folder):
    seed7, seed8 = finished[-1]
    run(folder, *SYNTHETIC, 'run.runs=1', 'run.seed=8')
    _, (again,) = read_log(folder / 'log.jsonl')
    for key in ('loss', 'acc', 'acc_plain', 'curve', 'steps'):
        assert again[key] == seed8[key], key
    assert again['loss'] != seed7['loss'] and again['curve'] != seed7['curve']

def test_a_diverging_run_says_where(folder):
    out, err = finish(start(folder, *SYNTHETIC, 'opt.lr=1e30', 'run.seed=7', 'run.runs=3'), status=1)
    assert err.count('\n') == 1 and re.search(r'\b7\b.*\bstep \d+\b', err), err
    (header,), lines = read_log(folder / 'log.jsonl')
    assert not lines and 'summary' not in out

def test_ctrl_c_ends_with_the_summary(folder):
    process, log = start(folder, *SYNTHETIC, 'run.runs=1000'), folder / 'log.jsonl'
    while not log.exists() or log.read_text().count('\n') < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, status=130)
    (header,), lines = read_log(log)
    assert err == '' and summary(out)['runs'] == len(lines) < 1000
    assert [line['seed'] for line in lines] == list(range(len(lines)))

@pytest.mark.skipif(not (REAL_DATA / 'MNIST.pt').exists(), reason='DATA_DIR has no MNIST.pt')
def test_real_mnist(folder):
    assert summary(run(folder, 'run.runs=1', DATA_DIR=str(REAL_DATA)))['acc'] > 0.987

def test_overrides_take_effect(finished, folder):
    """On a user's own set, with three classes."""
    labels = torch.arange(1000) % 3
    torch.save(make_set(labels, labels[:300]), folder / 'sets/Mine.pt')
    mine = 'data.name=Mine', 'run.log=log.jsonl', 'run.runs=1', 'run.target=0'
    result = summary(run(folder, *mine, 'opt.epochs=20'))
    run(folder, *mine, 'opt.epochs=1e-5', "run.device='cpu'")
    (long, least), lines = read_log(folder / 'log.jsonl')
    assert result['acc'] > 0.9 and result['target'] == 0
    assert [line['session'] for line in lines] == [long['session'], least['session']]
    assert lines[0]['steps'] > 5 and lines[1]['steps'] == 1  # however short, a run takes a step
    expected = finished[2]['hyp']
    for group, values in {'opt': {'epochs': 20.0}, 'data': {'name': 'Mine', 'dir': str(folder / 'sets')},
                          'run': {'device': 'auto', 'runs': 1, 'seed': 0, 'target': 0.0}}.items():
        expected = expected | {group: expected[group] | values}
    assert long['hyp'] == expected
    assert (least['hyp']['opt']['epochs'], least['hyp']['run']['device']) == (1e-5, 'cpu')

def test_wrong_overrides(folder):
    cases = {'opt.epoch=2': 'opt.epochs', 'batch_size=64': 'opt.batch_size', 'opt.epochs=fast': 'float',
             'run.runs=2.5': 'int', 'run.compile=1': 'bool', 'opt.lr={[]}': 'float'}
    for argument, line in zip(cases, fail_each(folder, [(argument,) for argument in cases], status=2)):
        assert argument in line and cases[argument] in line, line

def test_wrong_devices(folder):
    missing = [] if torch.cuda.is_available() else ['run.device=cuda', 'run.device=cuda:3']
    cases = [('data.name=Synthetic', argument) for argument in (*missing, 'run.device=gpu', 'run.dtype=half')]
    for (_, argument), line in zip(cases, fail_each(folder, cases)):
        assert argument in line, line

def idx(array):
    """uint8 [n] or [n, 28, 28] in the format of MNIST's own files."""
    return gzip.compress(struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.numpy().tobytes())

def test_torchvision_fetches_what_is_missing(folder):
    files, sent = {}, {}
    for split, part, size in (('train', 'train', 300), ('test', 't10k', 100)):
        images, labels = torch.randint(256, (size, 28, 28)).byte(), (torch.arange(size) % 10).byte()
        sent[split] = {'images': images[:, None], 'labels': labels.long()}
        files |= {f'{part}-images-idx3-ubyte.gz': idx(images), f'{part}-labels-idx1-ubyte.gz': idx(labels)}
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path.strip('/')])
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        mirror = torchvision_with(MNIST={'mirrors': [f'http://127.0.0.1:{server.server_port}/'],
                                         'resources': resources})
        # There is room for each file that torchvision downloads, but not for all images in one.
        out, err = finish(start(folder, LARGEST_FILE='280000', **mirror), status=1)
        server.shutdown()
    assert 'MNIST.pt' in err.splitlines()[-1] and 'summary' not in out
    assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part')]
    assert summary(run(folder, 'run.runs=1', **mirror))['runs'] == 1  # the server is down: from the downloaded files
    data = torch.load(folder / 'sets/MNIST.pt', weights_only=True)
    for split, key in itertools.product(sent, ('images', 'labels')):
        assert data[split][key].dtype == sent[split][key].dtype and torch.equal(data[split][key], sent[split][key])
    assert set(data) == {*sent, 'classes'} and [type(name) for name in data['classes']] == 10 * [str]
    assert not list(folder.rglob('*.part'))
    shutil.rmtree(folder / 'sets/MNIST')  # what torchvision downloaded
    assert summary(run(folder, 'run.runs=1'))['runs'] == 1

def test_no_network_and_no_file(folder):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(('127.0.0.1', 0))
        mirror = f'http://127.0.0.1:{unused.getsockname()[1]}/'
        line = fail(folder, 'run.runs=1', 'data.dir=here',
                    **torchvision_with(MNIST={'mirrors': [mirror], 'resources': [('train-images.gz', '0')]}))
    assert 'here/MNIST.pt' in line and 'refused' in line and 'data.name=Synthetic' in line, line
    assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part', '.gz')]

class Harm:
    """A pickle that makes a folder as it is loaded."""
    def __init__(self, path):
        self.path = str(path)
    def __reduce__(self):
        return os.mkdir, (self.path,)

def test_faulty_files(folder):
    """Each gets one line that names it and its fault, and is left as it was."""
    labels, harm = torch.arange(60) % 3, Harm(folder / 'harmed')
    good = make_set(labels, labels)
    def change(split, **values):
        return good | {split: good[split] | values}
    faults = {  # and what the line says of them
        'Foreign': (torch.zeros(3), ''),
        'Wide': (change('train', images=torch.zeros(60, 1, 32, 32).byte()), '32'),
        'Short': (change('train', labels=labels[:50]), '50'),
        'High': (change('test', labels=labels + 1), '3'),
        'Low': (change('train', labels=labels - 1), '-1'),
        'Harm': (good | {'classes': harm}, 'mkdir|code|pickle'), 'Pickle': (pickle.dumps(harm), ''),
        'Cut': (good, ''), 'Text': (b'no data here\n', ''),
    }
    paths = {name: folder / f'sets/{name}.pt' for name in faults}
    for name, (content, _) in faults.items():
        paths[name].write_bytes(content) if type(content) is bytes else torch.save(content, paths[name])
    paths['Cut'].write_bytes(paths['Cut'].read_bytes()[:-2000])
    before = [path.read_bytes() for path in paths.values()]
    lines = fail_each(folder, [(f'data.name={name}',) for name in faults])
    assert [path.read_bytes() for path in paths.values()] == before and set(folder.rglob('*.pt')) == set(paths.values())
    for (name, (_, said)), line in zip(faults.items(), lines):
        _, path, fault = line.partition(f'sets/{name}.pt')
        assert path and re.search(said, fault) and 20 < len(fault) < 500, line
        assert 'weights_only' not in fault, line  # torch's advice to do without this protection is not for users
    assert not (folder / 'harmed').exists()
    torch.load(paths['Harm'], weights_only=False)
    assert (folder / 'harmed').exists()  # so the pickle was harmful

def test_holdout_is_the_last_training_images(folder):
    """Class 2 is seen in the last half of the held-out images only; all the test labels are wrong."""
    labels = torch.cat((torch.arange(1200) % 2, torch.full((100,), 2)))
    data = make_set(labels, labels)
    data['test']['labels'] = (labels + 1) % 3
    torch.save(data, folder / 'sets/Mine.pt')
    mine = 'data.name=Mine', 'opt.epochs=20', 'run.runs=1'
    # Half, and not nothing (the test set), nor all (the first images, or images that were trained on).
    assert abs(summary(run(folder, *mine, 'run.holdout=200'))['acc'] - 0.5) < 0.05
    assert summary(run(folder, *mine))['acc'] < 0.05

def test_shift(monkeypatch):
    """Two ramps show where each pixel is taken from; there, a slow look-up takes it too."""
    shift, middle, aug = (internals()[name] for name in ('shift', 'middle', 'hyp'))
    aug = aug['aug']
    images = torch.randint(256, (300, 1, 28, 28)).byte()
    assert aug['shift'] == 0 and torch.allclose(shift(images), images.float(), atol=0.01)
    side = middle(images).shape[-1]
    edge = (28 - side) // 2
    assert side == internals()['hyp']['net']['crop'] and torch.equal(middle(images), images[..., 4:24, 4:24])
    monkeypatch.setitem(aug, 'shift', 7.0)
    ramp = (8 * torch.arange(28)).byte().expand(28, 28)
    torch.manual_seed(0)
    x_y = middle(shift(torch.stack((ramp, ramp.T)).expand(300, -1, -1, -1))) / 8  # [n, 2, side, side], in pixels
    moved = x_y[..., side // 2 - 1:side // 2 + 1, side // 2 - 1:side // 2 + 1].mean((2, 3)) - 13.5
    assert (moved.amax(0) > 0.95 * 7).all() and (moved.amin(0) < -0.95 * 7).all() and moved.abs().max() < 1.01 * 7
    torch.manual_seed(0)
    shifted = middle(shift(images))
    for image, row, column in itertools.product(range(3), range(side), range(side)):
        x, y, value = column + edge + moved[image, 0].item(), row + edge + moved[image, 1].item(), 0
        for near_x, near_y in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= near_x < 28 and 0 <= near_y < 28:  # there is nothing outside
                value += (1 - abs(x - near_x)) * (1 - abs(y - near_y)) * images[image, 0, near_y, near_x].item()
        assert shifted[image, 0, row, column].item() == pytest.approx(value, abs=0.5)

def test_orthogonalization():
    """The singular vectors stay; the singular values come near 1, whatever the matrix was multiplied by."""
    for shape, scale in (((32, 256), 1.0), ((64, 512), 1e-4), ((10, 64), 1e4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        values = left.T @ internals()['orthogonalize'](scale * x) @ right.T
        assert 0.5 < values.diag().min() and values.diag().max() < 1.5
        assert (values - values.diag().diag()).abs().max() < 1e-3

def test_t_test():
    """Student's table, met by samples of df + 1 values and an exact one: of quantiles, and of the probability there."""
    table = {1: (3.0777, 6.3138, 31.8205, 63.6567), 2: (1.8856, 2.9200, 6.9646, 9.9248),
             9: (1.3830, 1.8331, 2.8214, 3.2498), 29: (1.3114, 1.6991, 2.4620, 2.7564),
             99: (1.2902, 1.6604, 2.3646, 2.6264)}
    for df, row in table.items():
        accs = [(-1)**number * (1 if number < df or df % 2 else 0) for number in range(df + 1)]
        mean, error = statistics.mean(accs), statistics.stdev(accs) / math.sqrt(df + 1)
        for p, t in zip((0.9, 0.95, 0.99, 0.995), row):
            difference, ci99, higher = internals()['t_test'](accs, [mean - t * error])
            assert difference == pytest.approx(t * error) and ci99 == pytest.approx(row[-1] * error, rel=1e-3)
            assert higher == pytest.approx(p, abs=1e-5)
            assert internals()['t_test'](accs, [mean + t * error])[2] == pytest.approx(1 - p, abs=1e-5)
        assert internals()['t_test'](accs, [mean])[2] == pytest.approx(0.5)
        assert internals()['t_test'](accs, [-1e9])[2] == pytest.approx(1)

def test_summary_by_hand(capsys):
    """With accuracies m - 0.0002, m, m + 0.0002: std 0.0002, standard error 0.0002 / sqrt(3) = 0.00011547, and the
    quantile of Student's t at 0.995 with 2 degrees of freedom is 9.9248, so ci99 is 0.00114602. Over the target of 0.99
    by 0.0012: t = 10.39, P = 1/2 + t / (2 sqrt(2 + t**2)) = 0.9954 > 0.99. By 0.0002: t = 1.732, P = 0.887. By 0.0006:
    t = 5.196, P = 0.982, where a normal distribution would say yes."""
    def line(*accs):
        internals()['report']({}, [{'acc': acc, 'time_s': s} for acc, s in zip(accs, (9.0, 1.0, 2.0))], None)
        return summary(capsys.readouterr().out)
    for mean, met in ((0.9912, 'yes'), (0.9902, 'open'), (0.9906, 'open'), (0.9888, 'no')):
        assert line(mean + 0.0002, mean - 0.0002, mean) == {
            'script': 'mnist_fast', 'runs': 3, 'acc': mean, 'std': 0.0002, 'ci99': 0.00115, 'time_s': 2.0,
            'target': 0.99, 'met': met}
    assert (line(0.992)['met'], line(0.992)['acc'], line(0.992)['time_s']) == ('open', 0.992, 9.0)
    assert (line(0.992, 0.992)['met'], line(0.988, 0.988)['met']) == ('yes', 'no')

def write_log(path, header, accs, old='', new='', **changes):
    """A log of runs with these accuracies, whose header is changed: values of hyp by dotted names, a piece of code."""
    header = json.loads(json.dumps(header | {'session': str(path), 'code': header['code'].replace(old, new)}))
    for name, value in changes.items():
        header['hyp'][name.split('.')[0]][name.split('.')[1]] = value
    lines = [{'session': str(path), 'seed': seed, 'acc': acc, 'time_s': 1.0} for seed, acc in enumerate(accs)]
    path.write_text(''.join(json.dumps(line) + '\n' for line in [header, *lines]))

def test_baseline_by_hand(finished, folder):
    """0.991, 0.993, 0.995 after 0.990 to 0.993: means 0.993 and 0.9915, variances 4e-6 and 1.6667e-6, of the
    means 1.3333e-6 and 0.41667e-6; standard error sqrt(1.75e-6) = 0.00132288, t = 1.1339, degrees of freedom 1.75**2 /
    (1.3333**2 / 2 + 0.41667**2 / 3) = 3.2347, for which Student's t has 0.3338 outside of +- 1.1339 and 1 % outside of
    +- 5.4399 (from its incomplete beta function): +- 0.00720. With the second sample 0.02 lower it is better; the other
    way round it is worse."""
    header, code = finished[2], "'epochs': 0.9, "
    write_log(folder / 'base.jsonl', header, (0.990, 0.991, 0.992, 0.993))
    write_log(folder / 'low.jsonl', header, (0.970, 0.971, 0.972, 0.973))
    write_log(folder / 'new.jsonl', header, (0.991, 0.993, 0.995), code, "'epochs': 0.8, ",
              **{'opt.lr': 0.3, 'run.log': 'new.jsonl', 'run.runs': 3})
    def compare(new, base):
        out = run(folder, 'run.runs=0', f'run.log={new}.jsonl', f'run.baseline={base}.jsonl')
        assert summary(out)['runs'] == (3 if new == 'new' else 4)
        form = r'baseline  acc ([+-]\d\.\d{5}) \+- (\d\.\d{5}) \(99 %\)  p=(\S+)  (.+)'
        line, *diff = out.splitlines()[:-1]
        *numbers, verdict = re.fullmatch(form, line).groups()
        changed = [line for line in diff if line[0] in '+-' and line[:3] not in ('+++', '---')]
        return [float(number) for number in numbers], verdict, changed
    (difference, ci99, p), verdict, changed = compare('new', 'base')
    assert (difference, ci99) == (0.0015, pytest.approx(0.00720, abs=1.1e-5)) and p == pytest.approx(0.334, abs=0.007)
    needed = 4 * (1.5 * 5.4399 * 0.00132288 / 0.0015)**2
    said = int(re.fullmatch(r'open; about (\d+) runs of each would settle it', verdict)[1])
    assert said == pytest.approx(needed, abs=1)
    assert len(changed) == 4 and changed[2:] == ['-  "lr": 0.25,', '+  "lr": 0.3,']
    assert code in changed[0] and changed[0][0] == '-' and "'epochs': 0.8, " in changed[1] and changed[1][0] == '+'
    (difference, _, p), verdict, _ = compare('new', 'low')
    assert difference == 0.0215 and 0.0001 < p < 0.001 and verdict == 'better'
    assert compare('low', 'new')[1] == 'worse' and compare('low', 'base')[2] == []

def test_baseline_of_a_change(folder):
    """As a user works: a log, a change that hurts, its verdict."""
    few = *SYNTHETIC[:2], 'run.runs=4'
    run(folder, *few, 'run.log=base.jsonl')
    out = run(folder, *few, 'opt.epochs=0.05', 'run.baseline=base.jsonl')
    assert re.search(r'^baseline  acc -0\.\d{5} .* worse$', out, re.M) and '+  "epochs": 0.05,' in out.splitlines()
    assert summary(out)['runs'] == 4

def test_no_runs_summarises_the_log(finished, folder):
    """The last start, and those of the same code and hyp, each seed once."""
    header, (line, _) = finished[2:]
    def lines(session, accs, time_s, **opt):
        start = header | {'session': session, 'hyp': header['hyp'] | {'opt': header['hyp']['opt'] | opt}}
        runs = [line | {'session': session, 'seed': seed, 'acc': acc, 'time_s': time_s} for seed, acc in accs.items()]
        return ''.join(json.dumps(line) + '\n' for line in [start, *runs])
    text = (lines('a', {0: 0.991, 1: 0.992}, 1.0) + lines('b', {0: 0.5, 3: 0.5}, 9.0, epochs=9.0)
            + lines('c', {1: 0.992, 2: 0.993}, 2.0))
    (folder / 'log.jsonl').write_text(text)
    result = summary(run(folder, 'run.runs=0', 'run.log=log.jsonl'))
    assert (result['runs'], result['acc'], result['std'], result['time_s']) == (3, 0.992, 0.001, 2.0)
    assert (folder / 'log.jsonl').read_text() == text

def test_logs_that_cannot_be_used(finished, folder):
    """A path that cannot be written to, found before training; what cannot be summarised or compared with."""
    (folder / 'empty').write_text('')
    (folder / 'words').write_text('no log\n')
    (folder / 'header').write_text(finished[1].splitlines()[0] + '\n')
    write_log(folder / 'one', finished[2], [0.99])
    write_log(folder / 'other', finished[2] | {'script': 'cifar_fast'}, [0.99, 0.98, 0.97])
    write_log(folder / 'good', finished[2], [0.99, 0.98, 0.97])
    cases = {('run.log=/dev/full',): 'full', ('run.log=missing/log.jsonl',): 'missing/log.jsonl',
             ('run.picture=missing/a.png',): 'missing/a.png', ('run.save=missing/a.pt2',): 'missing/a.pt2'}
    bad = 'empty', 'words', 'header', 'missing', 'other'
    cases |= {('run.runs=0', f'run.log={name}'): name for name in bad}
    cases |= {(*arguments, f'run.baseline={name}'): name for name in (*bad, 'one')
              for arguments in ((), ('run.runs=0', 'run.log=good'))}
    lines = fail_each(folder, [('data.name=Synthetic', *arguments) for arguments in cases])
    for (arguments, name), line in zip(cases.items(), lines):
        assert arguments[-1] in line and name in line, line

@pytest.mark.parametrize('script', ['mnist_fast.py', 'fashion_fast.py', 'cifar_fast.py'])
def test_holdout_leaves_the_test_images_alone(folder, script):
    """They are not even in the file; the picture and the saved network do without them too."""
    data = make_set(torch.arange(900) % 3, torch.arange(1))
    if script == 'cifar_fast.py':
        data['train']['images'] = F.pad(data['train']['images'].expand(-1, 3, -1, -1), (2, 2, 2, 2))
    torch.save(data | {'test': None}, folder / 'sets/Mine.pt')
    small = () if script == 'mnist_fast.py' else ('net.widths=(8,16,16)', 'opt.batch_size=100')
    mine = 'data.name=Mine', 'opt.epochs=4', *small, 'run.runs=1'
    made = 'run.picture=a.png', 'run.save=a.pt2'
    out = run(folder, *mine, 'run.holdout=100', *made, script=script, **torchvision_with())
    assert summary(out)['acc'] > 0.3 and (folder / 'a.png').exists() and (folder / 'a.pt2').exists()
    assert 'Mine.pt' in fail(folder, *mine, script=script)

def check_picture(path):
    """Of the size that the docstring of draw states; each panel shows something, under words; where a panel has to have
    the network's look in orange it has, and nowhere else (the images are grey)."""
    pixels = bytearray(Image.open(path).convert('RGB').tobytes())
    picture = torch.frombuffer(pixels, dtype=torch.uint8).view(1138, 914, 3).float()
    for row, column in itertools.product(range(8), range(8)):
        top, left = 2 + 142 * row, 2 + 114 * column
        panel, words = picture[top + 29:top + 139, left + 1:left + 111], picture[top + 1:top + 28, left + 1:left + 111]
        assert panel.std() > 10 and words.max() > 200 and words.min() == 0, (row, column)
        orange = (panel[..., 0] - panel[..., 2]).amax()
        assert orange > 60 if row in (2, 3, 6, 7) else orange == 0, (row, column)
        assert words.flatten(0, 1).std(1).max() == 0  # white on black

@pytest.mark.parametrize('script', ['mnist_fast.py', 'fashion_fast.py', 'cifar_fast.py'])
def test_the_picture(folder, script):
    small = () if script == 'mnist_fast.py' else SMALL[3:]
    data = internals()['synthesize']((1, 28, 28))
    if script == 'cifar_fast.py':
        for split in ('train', 'test'):
            data[split]['images'] = F.pad(data[split]['images'].expand(-1, 3, -1, -1), (2, 2, 2, 2))
    torch.save(data, folder / 'sets/Mine.pt')
    run(folder, 'data.name=Mine', *small, 'run.runs=1', 'run.picture=a.png', script=script, **torchvision_with())
    check_picture(folder / 'a.png')

@pytest.mark.parametrize('script', ['mnist_fast.py', 'fashion_fast.py', 'cifar_fast.py'])
def test_the_saved_network(folder, script):
    """Gives float32 logits for any number of uint8 images, with the accuracy of the run, without the script."""
    small = ('opt.epochs=0.1',) if script == 'mnist_fast.py' else (*SMALL[3:], 'opt.epochs=0.5')
    run(folder, *SYNTHETIC, *small, 'run.runs=2', 'run.save=a.pt2', script=script)
    _, (_, last) = read_log(folder / 'log.jsonl')
    net = torch.export.load(folder / 'a.pt2').module()
    split = internals()['synthesize']((3, 32, 32) if script == 'cifar_fast.py' else (1, 28, 28))['test']
    for images in (split['images'][:1], split['images'][:7], split['images']):
        logits = net(images)
        assert logits.dtype == torch.float32 and logits.shape == (len(images), 10)
    acc = (logits.argmax(1) == split['labels']).float().mean()
    assert acc == pytest.approx(last['acc_plain'], abs=1e-6) and 0.11 < acc < 1
    assert (folder / 'a.pt2').stat().st_size < 2_000_000  # the weights, and no images

TORCHRUN = '-m', 'torch.distributed.run', '--standalone', '--local-addr=127.0.0.1', '--nproc-per-node=2'

def test_two_processes_share_the_runs(folder):
    """The same accuracies by seed as one process has, in one table and one summary; each writes its own runs."""
    out = run(folder, *SYNTHETIC, 'run.runs=5', 'run.seed=3', launcher=TORCHRUN)
    headers, lines = read_log(folder / 'log.jsonl')
    assert [header['threads'] for header in headers] == [1, 1]
    sessions = [{line['seed'] for line in lines if line['session'] == header['session']} for header in headers]
    assert sorted(sessions, key=len) == [{4, 6}, {3, 5, 7}]
    (folder / 'log.jsonl').unlink()
    alone = run(folder, *SYNTHETIC, 'run.runs=5', 'run.seed=3')
    for result in (summary(out), summary(alone)):
        assert (result['runs'], result['acc']) == (5, summary(alone)['acc'])
    columns = [re.findall(r'^ +(\d) +(\d) +([\d.]+) +([\d.]+) +([\d.]+) ', text, re.M) for text in (out, alone)]
    assert columns[0] == columns[1] and len(columns[0]) == 5
    _, others = read_log(folder / 'log.jsonl')
    results = [{(line['seed'], line['acc'], line['loss']) for line in found} for found in (lines, others)]
    assert results[0] == results[1] and len(results[0]) == 5

def test_a_killed_process_loses_no_finished_run(folder):
    process, log = start(folder, *SYNTHETIC, 'run.runs=1000', launcher=TORCHRUN), folder / 'log.jsonl'
    while not log.exists() or len({line['session'] for line in read_whole(log) if 'acc' in line}) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pids = [int(header['session'].split(', ')[-1]) for header in read_whole(log) if 'hyp' in header]
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1 and log.read_text().endswith('\n')
    headers, lines = read_log(log)
    assert len({line['session'] for line in lines}) == len(headers) == 2 and len(lines) < 1000
    assert summary(run(folder, 'run.runs=0', 'run.log=log.jsonl'))['runs'] == len({line['seed'] for line in lines})

def read_whole(path):
    """The lines of a log that may be growing."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]

# Runs a cell as IPython does, and keeps its last error as IPython does.
NOTEBOOK = '''
import _thread, gc, json, os, sys, threading, time
cells = json.load(open('cells.json'))
sys.argv = ['ipykernel_launcher.py', '-f', '/x/kernel.json']
names = {'__name__': '__main__', 'get_ipython': lambda: None, 'In': ['']}
say = {'good': [], 'held': []}

def run(name):
    names['In'].append(cells[name])
    try:
        exec(compile(cells[name], '<cell>', 'exec'), names)
    except BaseException as error:
        sys.last_value = error
        return error

def run_again():
    say['good'].append(repr(run('good')))
    gc.collect()
    tensor = names['torch'].Tensor
    say['held'].append(sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), tensor) and x.nbytes > 100_000))

def interrupt():
    while not os.path.exists('long.jsonl') or open('long.jsonl').read().count(chr(10)) < 2:
        time.sleep(0.005)
    _thread.interrupt_main()

run_again()
run_again()
say['shown'] = run('faulty')._render_traceback_()
run_again()
threading.Thread(target=interrupt).start()
run('long')
run_again()
json.dump(say, open('say.json', 'w'))
'''

@pytest.mark.parametrize('script, small', [('mnist_fast.py', {}),
                                           ('fashion_fast.py', {'widths': (4, 4, 4), 'epochs': 0.5}),
                                           ('cifar_fast.py', {'widths': (4, 4, 4), 'epochs': 0.5})])
def test_a_notebook_cell(folder, script, small):
    def cell(**values):
        text = (HERE / script).read_text()
        for key, value in (values | small).items():
            text = re.sub(rf"('{key}': )('\w*'|[\d.]+|\(.*?\))", rf'\g<1>{value!r}', text, count=1)
        return text
    labels = torch.arange(2000) % 3
    torch.save(make_set(labels, labels) | {'classes': ['ant', 'bee']}, folder / 'sets/Faulty.pt')
    cells = {'good': cell(name='Synthetic', runs=1, log='log.jsonl'), 'faulty': cell(name='Faulty', log='log.jsonl'),
             'long': cell(name='Synthetic', runs=1000, log='long.jsonl')}
    (folder / 'cells.json').write_text(json.dumps(cells))
    (folder / 'notebook.py').write_text(NOTEBOOK)
    out = run(folder, script=folder / 'notebook.py')
    say = json.loads((folder / 'say.json').read_text())
    headers, lines = read_log(folder / 'log.jsonl')
    assert say['good'] == 4 * ['None'] and len(headers) == len(lines) == 4
    assert all(header['code'] == cells['good'] for header in headers)
    assert all(line['curve'] == lines[0]['curve'] for line in lines)
    assert len(say['shown']) == 1 and 'Faulty.pt' in say['shown'][0] and '\n' not in say['shown'][0]
    runs = len(read_log(folder / 'long.jsonl')[1])
    assert re.search(rf'^summary .* runs={runs} ', out, re.M) and runs < 1000
    # Bytes of large tensors still alive after the first run, another, an error and another, Ctrl-C and another.
    assert max(say['held'][1:]) <= say['held'][0], say['held']

def sections(script):
    """The text of a script, by the banner above it."""
    parts = re.split(r'#{45}\n# +(\w+) +#\n#{45}\n', (HERE / script).read_text())
    return dict(zip(parts[1::2], parts[2::2]))

def test_shared_sections_are_the_same():
    mnist, *others = (sections(script) for script in ('mnist_fast.py', 'fashion_fast.py', 'cifar_fast.py'))
    assert list(mnist) == ['Hyperparameters', 'Setup', 'Data', 'Augmentation', 'Network', 'Optimizer', 'Training',
                           'Reporting', 'Main']
    assert sum(mnist[name].count('\n') + 3 for name in ('Setup', 'Data', 'Reporting')) <= 230
    for script, limit in {'mnist_fast.py': 450, 'fashion_fast.py': 450, 'cifar_fast.py': 550}.items():
        lines = (HERE / script).read_text().splitlines()
        assert len(lines) <= limit and max(len(line) for line in lines) <= 120, script
    for other in others:
        assert list(other) == list(mnist)
        for name in ('Setup', 'Data', 'Reporting', 'Main'):
            assert other[name] == mnist[name], name

@pytest.mark.parametrize('script', ['fashion_fast.py', 'cifar_fast.py'])
def test_learns(folder, script):
    """In under a minute on two cores, and one seed gives one result to the last bit."""
    result = summary(run(folder, *SMALL, 'run.runs=2', script=script))
    assert (result['script'], result['runs']) == (script[:-3], 2) and result['acc'] > 0.5  # chance is 0.1
    run(folder, *SMALL, 'run.runs=1', 'run.seed=1', script=script)
    _, (seed0, seed1, again) = read_log(folder / 'log.jsonl')
    assert again | {key: seed1[key] for key in ('session', 'time_s', 'total_s')} == seed1 != seed0
    assert seed0['total_s'] < 60

def test_cifar_recipes_run(folder):
    """With what the long recipes add: three convolutions in a group and a shortcut, cutout, larger shifts."""
    long = 'net.depth=3', 'aug.cutout=12', 'aug.shift=4', 'opt.batch_size=100'
    assert summary(run(folder, *SMALL, *long, 'run.runs=1', script='cifar_fast.py'))['acc'] > 0.3

def test_a_hundred_classes(folder):
    labels = torch.arange(2000) % 100
    images = (labels[:, None, None, None] * 2 + torch.randint(20, (2000, 3, 32, 32))).byte()
    torch.save({'train': {'images': images, 'labels': labels}, 'test': {'images': images, 'labels': labels},
                'classes': [str(number) for number in range(100)]}, folder / 'sets/Hundred.pt')
    small = 'net.widths=(8,16,32)', 'opt.batch_size=100', 'opt.epochs=10', 'run.runs=1'
    assert summary(run(folder, 'data.name=Hundred', *small, script='cifar_fast.py'))['acc'] > 0.1  # chance is 0.01

@pytest.mark.skipif(not (REAL_DATA / 'FashionMNIST.pt').exists(), reason='DATA_DIR has no FashionMNIST.pt')
def test_real_fashion(folder):
    short = 'net.widths=(8,16,32)', 'opt.epochs=1', 'opt.batch_size=250', 'run.runs=1'
    assert summary(run(folder, *short, script='fashion_fast.py', DATA_DIR=str(REAL_DATA)))['acc'] > 0.87

@pytest.mark.skipif(not (REAL_DATA / 'CIFAR10.pt').exists(), reason='DATA_DIR has no CIFAR10.pt')
def test_real_cifar(folder):
    short = 'net.widths=(16,32,64)', 'opt.epochs=2', 'opt.batch_size=250', 'run.runs=1'
    assert summary(run(folder, *short, script='cifar_fast.py', DATA_DIR=str(REAL_DATA)))['acc'] > 0.68

def cifar_archive():
    """CIFAR-10's archive in small -> its bytes, what torchvision's class must know of it, the images, the labels."""
    random, batches, images, labels = torch.Generator().manual_seed(0), {}, {}, {}
    for name in [f'data_batch_{number}' for number in range(1, 6)] + ['test_batch']:
        images[name] = torch.randint(256, (40, 3, 32, 32), generator=random).byte()
        labels[name] = torch.randint(10, (40,), generator=random)
        batches[name] = {'data': images[name].flatten(1).numpy(), 'labels': labels[name].tolist()}
    batches['batches.meta'] = {'label_names': [f'class {number}' for number in range(10)]}
    file, md5 = io.BytesIO(), {}
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
        for name, content in batches.items():
            content = pickle.dumps(content)
            entry = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            entry.size, md5[name] = len(content), hashlib.md5(content).hexdigest()
            archive.addfile(entry, io.BytesIO(content))
    known = {'tgz_md5': hashlib.md5(file.getvalue()).hexdigest(),
             'train_list': [[name, md5[name]] for name in md5 if name.startswith('data')],
             'test_list': [['test_batch', md5['test_batch']]],
             'meta': {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5['batches.meta']}}
    return file.getvalue(), known, torch.cat([*images.values()]), torch.cat([*labels.values()])

def test_mirrors(folder):
    """The mirror stalls, or is dead; torchvision's own server has the archive: broken, then whole."""
    content, known, images, labels = cifar_archive()
    served, stop = {'/good.tar.gz': content[:-9] + bytes(9)}, threading.Event()
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.path in served:
                self.wfile.write(served[self.path])
            else:
                stop.wait()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server, socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # but nobody listens
        threading.Thread(target=server.serve_forever).start()
        address = f'http://127.0.0.1:{server.server_port}'
        text = (HERE / 'cifar_fast.py').read_text().replace('setdefaulttimeout(20)', 'setdefaulttimeout(1)')
        mirror = re.search(r'https://[\w./-]*dataset-mirror', text)[0]
        script, dead = folder / 'cifar_fast.py', f'http://127.0.0.1:{unused.getsockname()[1]}/dead'
        arguments = 'net.widths=(8,8,8)', 'run.runs=1', 'opt.epochs=1'
        torchvision = torchvision_with(CIFAR10={'url': f'{address}/good.tar.gz', **known})
        try:
            script.write_text(text.replace(mirror, f'{address}/stalls'))
            out, err = finish(start(folder, *arguments, script=script, **torchvision), status=1)
            assert 'sets/CIFAR10.pt' in err.splitlines()[-1] and 'summary' not in out
            assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part')]
            assert [line for line in out.splitlines() if 'stalls' in line and 'timed out' in line], out
            served['/good.tar.gz'] = content
            script.write_text(text.replace(mirror, dead))
            out, err = finish(start(folder, *arguments, script=script, **torchvision))
        finally:
            stop.set()
            server.shutdown()
    assert [line for line in out.splitlines() if 'dead' in line and 'refused' in line], out
    data = torch.load(folder / 'sets/CIFAR10.pt', weights_only=True)
    assert data['classes'] == [f'class {number}' for number in range(10)] and not list(folder.rglob('*.part'))
    for key, values in {'images': images, 'labels': labels}.items():
        found = torch.cat((data['train'][key], data['test'][key]))
        assert found.dtype == values.dtype and torch.equal(found, values), key

def test_augment():
    """Two ramps show where each pixel is taken from; there, a slow look-up takes it too."""
    augment = internals('cifar_fast')['augment']
    ramp = (4 * torch.arange(32)).byte().expand(32, 32)
    images = torch.randint(256, (500, 3, 32, 32)).byte()
    index, mirrored = torch.randperm(500), torch.rand(500) < 0.5
    torch.manual_seed(0)
    ramps = augment(torch.stack((ramp.T, ramp, ramp)).expand(500, -1, -1, -1), index, mirrored, 32) / 4
    down, right = ramps[:, 0, 16, 16] - 16, torch.where(mirrored, 15 - ramps[:, 1, 16, 16], ramps[:, 1, 16, 16] - 16)
    assert {*zip(down.tolist(), right.tolist())} == {*itertools.product(range(-2, 3), repeat=2)}
    torch.manual_seed(0)
    batch = augment(images, index, mirrored, 32)
    assert batch.shape == (500, 3, 32, 32)
    for number in range(20):
        image = images[index[number]].flip(2) if mirrored[number] else images[index[number]]
        for row, column in itertools.product(range(32), range(32)):
            y, x = int(row + down[number]), int(column + right[number])
            y, x = -y if y < 0 else 62 - y if y > 31 else y, -x if x < 0 else 62 - x if x > 31 else x
            assert batch[number, :, row, column].tolist() == image[:, y, x].tolist()
    torch.manual_seed(0)
    small = augment(images, index, mirrored, 16)
    assert torch.allclose(small, F.avg_pool2d(batch, 2), atol=1e-3)

def test_cutout(monkeypatch):
    """Each image loses one square, whole, at any place, to grey."""
    monkeypatch.setitem(internals('cifar_fast')['hyp']['aug'], 'cutout', 12)
    images, index = torch.full((1, 3, 32, 32), 200).byte(), torch.zeros(2000, dtype=torch.int64)
    blank = internals('cifar_fast')['augment'](images, index, index > 0, 32) == 120
    assert torch.equal(blank[:, 0], blank[:, 1]) and torch.equal(blank[:, 0], blank[:, 2])
    corners = check_squares(blank, 12)
    assert {row for row, _ in corners} == {column for _, column in corners} == {*range(21)}

def test_fashion_augment(monkeypatch):
    """As test_augment, for fashion_fast.py, which mirrors by a draw of its own and blacks out a square."""
    augment, aug = internals('fashion_fast')['augment'], internals('fashion_fast')['hyp']['aug']
    monkeypatch.setitem(aug, 'shift', 2)
    ramp = (4 * torch.arange(28)).byte().expand(28, 28)
    images, index = torch.randint(1, 256, (500, 1, 28, 28)).byte(), torch.randperm(500)
    torch.manual_seed(0)
    down = augment(ramp.T.expand(500, 1, -1, -1), index)[:, 0, 14, 14] / 4 - 14
    torch.manual_seed(0)
    middle = augment(ramp.expand(500, 1, -1, -1), index)[:, 0, 14, 14:16] / 4
    mirrored = middle[:, 0] > middle[:, 1]
    right = torch.where(mirrored, 13 - middle[:, 0], middle[:, 0] - 14)
    assert {*zip(down.tolist(), right.tolist())} == {*itertools.product(range(-2, 3), repeat=2)}
    assert 200 < mirrored.sum() < 300
    torch.manual_seed(0)
    batch = augment(images, index)
    assert batch.shape == (500, 1, 28, 28)
    for number in range(20):
        image = images[index[number], 0].flip(1) if mirrored[number] else images[index[number], 0]
        for row, column in itertools.product(range(28), range(28)):
            y, x = int(row + down[number]), int(column + right[number])
            y, x = -y if y < 0 else 54 - y if y > 27 else y, -x if x < 0 else 54 - x if x > 27 else x
            assert batch[number, 0, row, column] == image[y, x]
    for key, value in {'flip': False, 'shift': 0, 'cutout': 8}.items():
        monkeypatch.setitem(aug, key, value)
    batch = augment(images, index)
    assert torch.equal(batch[batch > 0], images[index][batch > 0].float())
    corners = check_squares(batch == 0, 8)
    assert len(corners) > 250 and {row for row, _ in corners} == {column for _, column in corners} == {*range(21)}
    for key in aug:
        monkeypatch.setitem(aug, key, 0)
    assert torch.equal(augment(images, index), images[index].float())

def check_squares(blank, size):
    """bool [n, 1, H, W], each image with one blank square of that size -> the set of their corners."""
    corners = set()
    for image in blank[:, 0]:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert image.sum() == size**2 and len(rows) == len(columns) == size
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == size - 1
        corners.add((rows[0].item(), columns[0].item()))
    return corners

def test_candidates(monkeypatch):
    """Of the images that a step of fashion_fast.py draws it learns from those it has not seen, then from those whose
    loss was highest when last seen."""
    names, draws, batches, losses = internals('fashion_fast'), [], [], []
    def randint(*arguments, randint=torch.randint, **options):
        values = randint(*arguments, **options)
        draws.extend([values.tolist()] if values.ndim == 1 else [])
        return values
    def augment(images, index, augment=names['augment']):
        batches.append(index.tolist())
        return augment(images, index)
    def cross_entropy(*arguments, cross_entropy=F.cross_entropy, **options):
        loss = cross_entropy(*arguments, **options)
        losses.extend([loss.tolist()] if loss.ndim else [])
        return loss
    monkeypatch.setattr(torch, 'randint', randint)
    monkeypatch.setitem(names, 'augment', augment)
    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    monkeypatch.setitem(names['hyp']['net'], 'widths', (4, 4, 4))
    monkeypatch.setitem(names['hyp']['aug'], 'flip', False)
    for key, value in {'epochs': 3.0, 'batch_size': 20, 'candidates': 3.0}.items():
        monkeypatch.setitem(names['hyp']['opt'], key, value)
    images, labels = torch.randint(256, (400, 1, 28, 28)).byte(), torch.arange(400) % 10
    split = {'images': images, 'labels': labels}
    train, *_ = names['make_train']({'train': split, 'test': split, 'classes': [*range(10)]}, torch.device('cpu'), None)
    train(seed=0)
    assert len(draws) == len(batches) == len(losses) == 60 and {len(draw) for draw in draws} == {60}
    assert len({image for draw in draws for image in draw}) > 390
    last_losses = dict.fromkeys(range(400), math.inf)
    for drawn, batch, loss in zip(draws, batches, losses, strict=True):
        expected = sorted((last_losses[image] for image in drawn), reverse=True)[:20]
        assert sorted((last_losses[image] for image in batch), reverse=True) == expected and {*batch} <= {*drawn}
        last_losses |= dict(zip(batch, loss))

def watch_training(monkeypatch, images, **opt):
    """A function that runs a tiny network of cifar_fast.py over random images -> a list of (image, mirrored, loss)."""
    names, seen, losses = internals('cifar_fast'), [], []
    def augment(images, index, mirrored, side, augment=names['augment']):
        seen.extend(zip(index.tolist(), mirrored.tolist()))
        return augment(images, index, mirrored, side)
    def cross_entropy(*arguments, cross_entropy=F.cross_entropy, **options):
        loss = cross_entropy(*arguments, **options)
        losses.extend(loss.tolist() if loss.ndim else [])
        return loss
    monkeypatch.setitem(names, 'augment', augment)
    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    monkeypatch.setitem(names['hyp']['net'], 'widths', (4, 4, 4))
    for key, value in opt.items():
        monkeypatch.setitem(names['hyp']['opt'], key, value)
    split = {'images': torch.randint(256, (images, 3, 32, 32)).byte(), 'labels': torch.arange(images) % 10}
    train, *_ = names['make_train']({'train': split, 'test': split, 'classes': [*range(10)]}, torch.device('cpu'), None)
    train(seed=0)
    return [(image, way, loss) for (image, way), loss in zip(seen, losses, strict=True)]

def test_alternating_flip(monkeypatch):
    """In two passes each image is seen once each way, in an order that changes."""
    seen = [row[:2] for row in watch_training(monkeypatch, 200, epochs=2.0, full_epochs=2, batch_size=50)]
    assert len(seen) == 400 and sorted(seen) == [(image, way) for image in range(200) for way in (False, True)]
    first, second = [[image for image, _ in part] for part in (seen[:200], seen[200:])]
    assert sorted(first) == sorted(second) and first != second
    assert 60 < sum(way for _, way in seen[:200]) < 140
    monkeypatch.setitem(internals('cifar_fast')['hyp']['aug'], 'flip', False)
    seen = watch_training(monkeypatch, 200, epochs=2.0, full_epochs=2, batch_size=50)
    assert len(seen) == 400 and not any(way for _, way, _ in seen)

def test_hard_images(monkeypatch):
    """After the full passes, each pass has the images whose loss was highest when last seen, in batches of a size."""
    seen = watch_training(monkeypatch, 200, epochs=3.5, full_epochs=1, hard=0.5, batch_size=40)
    passes = seen[:200], seen[200:280], seen[280:360], seen[360:]  # of 100 images, 80 make whole batches
    assert len(passes[-1]) == 40 and len({image for image, *_ in passes[0]}) == 200
    last_losses = {image: loss for image, _, loss in passes[0]}
    for part in passes[1:]:
        hardest = sorted(last_losses, key=last_losses.get)[-100:]
        images = [image for image, *_ in part]
        assert len(set(images)) == len(images) and set(images) <= set(hardest)
        last_losses |= {image: loss for image, _, loss in part}
    assert {image for image, *_ in passes[1]} != {image for image, *_ in passes[2]}

def test_whitening():
    """What the first layer makes of the images' patches has the identity as its second moments, sign for sign."""
    names = internals('cifar_fast')
    net = names['Net'](10)
    images = (128 + 150 * F.avg_pool2d(torch.randn(200, 3, 36, 36), 5, 1)).byte()  # neighbours are alike
    names['reset'](net, images)
    images = images.float()
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    x = F.conv2d(images, net.whiten.weight).transpose(0, 1).flatten(1)
    assert torch.equal(x[:12], -x[12:])
    patches = F.unfold(images, 2).transpose(0, 1).flatten(1)
    variances = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    assert variances.min() > 0.005  # against the 0.0005 that is added to them
    moments = x[:12] @ x[:12].T / x.shape[1]
    assert torch.allclose(moments, (variances / (variances + 5e-4)).diag(), atol=2e-3)
    assert torch.allclose(moments, torch.eye(12), atol=0.1)

def test_batched_orthogonalization():
    """As in mnist_fast.py, for three matrices at a time, each of another size."""
    x = torch.randn(3, 32, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-4, 1, 1e4])[:, None, None]
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    values = left.mT @ internals('cifar_fast')['orthogonalize'](x) @ right.mT
    diagonals = values.diagonal(dim1=1, dim2=2)
    assert 0.5 < diagonals.min() and diagonals.max() < 1.5
    assert (values - diagonals.diag_embed()).abs().max() < 1e-3

def test_look_ahead(monkeypatch):
    """Weights that gain 1 between two pulls of 1 - 0.9**5 each: after n of them they stand at n (1 - 0.9**5)."""
    look_ahead, ema = internals('cifar_fast')['look_ahead'], internals('cifar_fast')['hyp']['ema']
    monkeypatch.setitem(ema, 'decay', 0.9), monkeypatch.setitem(ema, 'every', 5)
    weights, average = [torch.zeros(3), torch.ones(2, 2)], [torch.zeros(3), torch.ones(2, 2)]
    for _ in range(10):
        torch._foreach_add_(weights, 1.0)
        look_ahead(weights, average, share=1.0)
    for values in (weights, average):
        assert torch.allclose(values[0], torch.full((3,), 10 * (1 - 0.9**5)))
        assert torch.allclose(values[1], torch.full((2, 2), 1 + 10 * (1 - 0.9**5)))
    torch._foreach_add_(weights, 1.0)
    before = weights[0].clone()
    look_ahead(weights, average, share=0.0)  # at the start the weights are free
    assert torch.equal(weights[0], before) and torch.equal(average[0], before)

def snippets():
    """The Python blocks of README.md, by the name in the comment before each."""
    return dict(re.findall(r'<!-- snippet: (.+?) -->\n```python\n(.+?)```', (HERE / 'README.md').read_text(), re.S))

def test_readme_own_images(folder):
    """Folders of pictures become a data file that the script learns from."""
    (folder / 'make.py').write_text('''
import os, torch
from torchvision.io import write_png
for split, count in (('train', 60), ('test', 20)):
    for label, name in enumerate(('dark', 'light')):
        os.makedirs(f'pictures/{split}/{name}')
        for number in range(count):
            picture = torch.randint(110, (3, 40, 30), dtype=torch.uint8) + 140 * label
            write_png(picture.byte(), f'pictures/{split}/{name}/{number}.png')
os.mkdir('data')
''' + snippets()['own images'])
    finish(start(folder, script=folder / 'make.py', **torchvision_with()))
    data = torch.load(folder / 'data/Mine.pt', weights_only=True)
    assert data['classes'] == ['dark', 'light'] and data['train']['images'].shape == (120, 1, 28, 28)
    out = run(folder, 'data.name=Mine', 'data.dir=data', 'run.runs=1', 'opt.epochs=60', 'opt.batch_size=20')
    assert summary(out)['acc'] > 0.9

def test_readme_classifies_a_folder(folder):
    """PNG files of the test images, without the script, as well as it did."""
    labels = torch.arange(900) % 3
    data = make_set(labels, labels[:60])
    torch.save(data, folder / 'sets/Mine.pt')
    run(folder, 'data.name=Mine', 'opt.epochs=3', 'run.runs=1', 'run.save=mnist.pt2', 'run.log=log.jsonl')
    _, (line,) = read_log(folder / 'log.jsonl')
    (folder / 'pictures').mkdir()
    for number, image in enumerate(data['test']['images']):
        Image.fromarray(image[0].numpy()).save(folder / f'pictures/{number:02d}.png')
    (folder / 'classify.py').write_text(snippets()['saved network'])
    out, _ = finish(start(folder, script=folder / 'classify.py', **torchvision_with()))
    names, answers = zip(*(said.split() for said in out.splitlines()))
    assert list(names) == [f'pictures/{number:02d}.png' for number in range(60)]
    right = sum(int(answer) == label for answer, label in zip(answers, labels.tolist()))
    assert right / 60 == pytest.approx(line['acc_plain'], abs=1e-6) and 20 < right

def test_readme_counts_the_compute(folder):
    """One step of 1000 images and a test of 2000, by hand: a convolution's backward pass is two of its forward passes,
    for the weights and for the inputs, where both are needed."""
    (folder / 'count.py').write_text(snippets()['compute'])
    shutil.copy(HERE / 'cifar_fast.py', folder)
    small = 'net.widths=(8,8,16)', 'opt.epochs=1e-5', 'opt.batch_size=1000', 'tta.share=1e-5'
    out, _ = finish(start(folder, 'data.name=Synthetic', *small, script=folder / 'count.py'))
    whiten, first = 2 * 12 * 24 * 31**2, 2 * 9 * 24 * 8 * 31**2
    rest = 2 * 9 * (8 * 8 * 15**2 * 2 + 8 * 8 * 7**2 + 8 * 16 * 7**2 + 16 * 16 * 3**2) + 2 * 16 * 10
    expected = (1000 + 2000 + 6) * (whiten + first + rest) + 1000 * (first + 2 * rest)
    expected += 2 * 12 * 12 * 31**2 * 1000  # the patches' moments
    assert float(out.splitlines()[-1].split()[0]) * 1e15 == pytest.approx(expected, rel=0.02)

def test_readme_reads_a_log(folder, finished):
    """The snippet prints the mean of the runs in a log; where matplotlib is, the other draws their curves."""
    _, text, _, lines = finished
    (folder / 'mnist.jsonl').write_text(text)
    has_matplotlib = importlib.util.find_spec('matplotlib') is not None
    (folder / 'read.py').write_text(snippets()['read'] + (snippets()['curves'] if has_matplotlib else ''))
    out, _ = finish(start(folder, script=folder / 'read.py', MPLBACKEND='Agg'))
    assert out.strip() == f'2 runs, mean accuracy {sum(line["acc"] for line in lines) / 2}'
    assert (folder / 'curves.png').exists() == has_matplotlib
