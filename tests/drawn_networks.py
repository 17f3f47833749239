"""Small networks drawn at random, as Python source: for tests of what compiles graphs.

``draw(seed)`` writes a program of chains (convolution, sum, ReLU, pooling) in all spellings of
torch's and of this library's, with whatever may come between their members: other readers,
mutation, views, regions of autocast and no_grad, casts, hooks, checkpoints.
"""

from itertools import count
from random import Random

import torch
from drawn_programs import Program, Writer
from torch import Tensor, nn

INEXACT = ("sigmoid", "tanh", "gelu", "leaky_relu", "mean", "norm", "avg_pool2d")
"""Words of lines that make of what they read more than sums, maxima and multiples by 2 or 0.5."""


def draw(seed: int) -> Program:
    """The program of this number: the first one drawn whose values eager torch differentiates.

    That of dead ends, too: AOTAutograd also does where they end a graph.
    """
    attempts = (_drawn(seed, Random(f"{seed}, {i}")) for i in count())
    return next(program for program in attempts if program is not None)


def _drawn(seed: int, random: Random) -> Program | None:
    dtype = random.choice((torch.float64, torch.float64, torch.float32))
    training, channels_last = random.random() < 0.7, random.random() < 0.3
    autocast = dtype == torch.float32 and random.random() < 0.15
    with (
        torch.random.fork_rng(),
        torch.set_grad_enabled(training),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        writer = _Network(random, dtype, training, channels_last)
        for _ in range(random.randint(2, 3)):
            writer.chain()
        writer.close(0)
    results, text = writer.results(), "\n".join(writer.lines)
    tensors = [value for value in writer.names.values() if isinstance(value, Tensor)]
    try:
        differentiable = (t.sum() for t in tensors if t.requires_grad)
        sum(differentiable, torch.zeros((), requires_grad=True)).backward()
    except RuntimeError:  # what it saved has been modified in place
        return None
    return Program(
        seed,
        dtype,
        writer.coarsest,
        writer.coarsest == torch.bfloat16 and not any(word in text for word in INEXACT),
        channels_last,
        training,
        autocast,
        random.random() < 0.15,
        tuple(writer.leaves),
        tuple(writer.inputs),
        tuple(writer.used_layers()),
        tuple(writer.lines),
        tuple(results),
    )


class _Network(Writer):
    def __init__(self, random: Random, dtype: torch.dtype, training: bool, channels_last: bool):
        super().__init__(random, dtype, training, channels_last)
        self.returned: list[str] = []
        self.operands: list[str] = []  # of the chain that is being written
        size = (
            f"{self.pick(1, 2)}, {self.pick(2, 4, 4, 6)}, {self.pick(5, 7, 8)}, {self.pick(5, 7)}"
        )
        for i in range(self.pick(1, 2, 2)):
            grad = ", requires_grad=True" if self.maybe(0.7) else ""
            self.leaves.append(f"torch.randn({size}, dtype={dtype}{grad})")
            layout = "torch.channels_last" if self.maybe(0.1) else "layout"
            self.inputs.append(f"leaf{i}.clone(memory_format={layout})")
        if self.maybe(0.1):
            view = self.pick("x0[:, :2]", "x0.transpose(2, 3)")
            # AOTAutograd takes mutated views of dense inputs, of others not always.
            self.inputs += [view] * (not channels_last)
        self.names["layout"] = self.layout
        for prefix, values in (("leaf", self.leaves), ("x", self.inputs)):
            for i, value in enumerate(values):
                exec(f"{prefix}{i} = {value}", self.names)

    def results(self) -> list[str]:
        """What forward returns: the last image, what a chain meant to return, and a few others."""
        names = self.maps()
        others = [name for name in names[:-1] if self.maybe(0.07)]
        return list(dict.fromkeys([names[-1], *self.returned, *others]))

    # Chains.

    def chain(self) -> None:
        """A convolution and what may follow it, with interruptions."""
        x = self.pick_recent(self.maps())
        self.operands = [x]
        if self.maybe(0.1) and (y := self.assign(self.block(x))):
            return self.interruption(y)
        y = self.assign(self.convolution(x), x)
        if y is None:
            return None
        for step, probability in (
            (self.sum, 0.45),
            (self.sum, 0.1),
            (self.relu, 0.85),
            (self.relu, 0.08),
            (self.sum, 0.08),
            (self.pool, 0.55),
            (self.relu, 0.1),
        ):
            if self.maybe(0.22):
                y = self.interruption(y)
            if self.maybe(probability):
                y = step(y)
        self.returned += [y] * self.maybe(0.6)
        return None

    def block(self, x: str) -> str:
        """The call of several layers, checkpointed or not."""
        C = self.names[x].shape[-3]
        relu, pool = self.pick("", "inplace=True"), self.pick("", ", nn.MaxPool2d(2)")
        layers = f"nn.Conv2d({C}, {C}, 3, padding=1), nn.ReLU({relu}){pool}"
        body = self.layer("block", f"nn.Sequential({layers})")
        if self.maybe(0.3):
            other = self.pick_recent(self.maps(self.names[x]))
            body = f"lambda v: TF.relu({body}[0](v) + {other})"
        elif self.maybe(0.4):
            return f"{body}({x})"
        # AOTAutograd refuses what eager torch takes: to change a checkpoint's result in place.
        return f"checkpoint({body}, {x}, use_reentrant=False) + 1"

    def convolution(self, x: str) -> str:
        C = self.names[x].shape[-3]
        shared = [
            name
            for name, layer in self.names["self"].named_children()
            if isinstance(layer, nn.Conv2d) and layer.in_channels == C
        ]
        if shared and self.maybe(0.2):
            layer = f"self.{self.pick(*shared)}"
            self.operands += [f"{layer}.weight", f"{layer}.bias"]
            return f"{layer}({x})"
        if self.maybe(0.1):
            return self.transposed(x, C)
        K = C if self.maybe(0.85) else self.pick(2, 3, 4, 8)
        K, groups = self.pick(*[(K, 1)] * 6, (K + K % 2, 2 - C % 2), (C, C), (2 * C, C))
        if self.maybe(0.75):  # of x's size
            kernel, padding, dilation = self.pick(
                *[("3", "1", "1")] * 4,
                ("1", "0", "1"),
                ("(3, 1)", "(1, 0)", "1"),
                ("3", "'same'", "1"),
                ("2", "'same'", "2"),
                ("3", "2", "2"),
            )
            stride = "1"
        else:
            kernel, padding = (
                self.pick("2", "3", "(2, 3)"),
                self.pick("0", "1", "(0, 1)", "'valid'"),
            )
            stride, dilation = self.pick("1", "2", "(2, 1)"), "1"
        geometry = {
            "stride": (stride, "1"),
            "padding": (padding, "0"),
            "dilation": (dilation, "1"),
            "groups": (str(groups), "1"),
        }
        if self.maybe(0.55):
            return self.conv_module(x, C, K, kernel, geometry)
        return self.conv_function(x, C // groups, K, kernel, geometry)

    def conv_module(self, x: str, C: int, K: int, kernel: str, geometry: dict) -> str:
        sizes = {"in_channels": str(C), "out_channels": str(K), "kernel_size": kernel}
        optional = {**geometry, "bias": (self.pick("True", "True", "False"), "True")}
        name = self.pick(*["nn.Conv2d"] * 6, "cnn.Conv2d", "cnn.ConvReLU2d")
        constructor = self.call(name, sizes, optional)
        if name == "cnn.ConvReLU2d" and self.maybe(0.5):
            name = "cnn.ConvReLUMaxPool2d"
            constructor = f"{name}({C}, {K}, 3, padding=1, pool_kernel_size=2)"
        layer = self.layer("conv", constructor)
        if self.maybe(0.12):
            self.layers.append(f"{layer}.requires_grad_(False)")
            self.execute(self.layers[-1])
        if self.maybe(0.06):
            self.layers.append(f"{layer}.register_forward_hook({self.pick('double', 'keep')})")
            self.execute(self.layers[-1])
        self.operands += [f"{layer}.weight", f"{layer}.bias"]
        return f"{layer}({x})"

    def conv_function(self, x: str, C: int, K: int, kernel: str, geometry: dict) -> str:
        R, S = eval(kernel) if kernel.startswith("(") else (int(kernel), int(kernel))
        weight = self.parameter(
            "weight", f"torch.randn({K}, {C}, {R}, {S}) / {(C * R * S) ** 0.5:.1f}"
        )
        bias = self.pick("None", *[self.parameter("bias", f"torch.randn({K})")] * 3)
        self.operands += [weight, bias]
        weight = self.pick(*[weight] * 6, f"{weight} * 2", f"torch.tanh({weight})")
        required = {"input": x, "weight": weight}
        optional = {"bias": (bias, "None"), **geometry}
        function = self.pick("TF.conv2d", "TF.conv2d", "torch.conv2d", "F.conv2d")
        text = self.call(function, required, optional)
        if function == "F.conv2d" and self.maybe(0.5):
            text = f"{text[:-1]}, activation='relu')"
        if function == "F.conv2d" and self.maybe(0.3):
            text = f"{text[:-1]}, residual={self.pick_recent(self.maps())})"
        if function == "F.conv2d" and self.maybe(0.2):
            text = self.call("F.conv2d_relu_max_pool2d", required, optional)
            text = f"{text[:-1]}, pool_kernel_size={self.pick('2', '3')}, pool_stride=2)"
        return text

    def transposed(self, x: str, C: int) -> str:
        K, stride = self.pick(C, C, 2), self.pick("1", "2")
        if self.maybe(0.5):
            name = self.pick("nn.ConvTranspose2d", "cnn.ConvTranspose2d")
            layer = self.layer("up", f"{name}({C}, {K}, 3, {stride}, padding=1)")
            self.operands += [f"{layer}.weight", f"{layer}.bias"]
            return f"{layer}({x})"
        weight = self.parameter("weight", f"torch.randn({C}, {K}, 3, 3) / {3 * C**0.5:.1f}")
        bias = self.pick("None", self.parameter("bias", f"torch.randn({K})"))
        self.operands += [weight, bias]
        function = self.pick("TF.conv_transpose2d", "torch.conv_transpose2d", "F.conv_transpose2d")
        geometry = {
            "bias": (bias, "None"),
            "stride": (stride, "1"),
            "padding": ("1", "0"),
            "output_padding": (self.pick("0", str(int(stride) - 1)), "0"),
            "groups": ("1", "1"),
            "dilation": ("1", "1"),
        }
        return self.call(function, {"input": x, "weight": weight}, geometry)

    def parameter(self, prefix: str, value: str) -> str:
        if self.maybe(0.15):
            return self.layer(prefix, f"self.register_buffer('NAME', {value})")
        grad = ", requires_grad=False" if self.maybe(0.12) else ""
        return self.layer(prefix, f"nn.Parameter({value}{grad})")

    def sum(self, y: str) -> str:
        """y plus an operand: of its shape, made now or before, broadcast, a number, itself."""
        value = self.names[y]
        like = [name for name in self.maps(value) if name != y]
        if not like and self.maybe(0.9):
            return y
        b = self.pick_recent(like or [y])
        if self.maybe(0.25):
            made = self.pick(f"TF.relu({b})", f"{b} * 0.5", f"self.{self.similar(value)}({b})")
            b = self.assign(made) or b
        self.operands.append(b)
        if self.maybe(0.08):
            return b if self.write(self.pick(f"{b} += {y}", f"{b}.add_({y})")) else y
        if self.maybe(0.25):
            # A copy, as what a sum reads of what it writes to depends on the order of its elements.
            channel = f"{b}[:, :1] * 2" if value.dim() == 4 else f"{b}[:1] * 2"
            number = self.pick("1.5", "2", f"{b}.mean()")
            b = self.pick(channel, channel, number, y, f"{b}.float()", f"{b} * 0.5")
        expressions = (
            *[f"{y} + {b}"] * 4,
            *[f"{b} + {y}"] * 2,
            f"torch.add({y}, {b})",
            f"torch.add({b}, other={y})",
            f"torch.add({y}, {b}, alpha=2)",
            f"{y}.add({b})",
            f"{y}.add({b}, alpha=0.5)",
            f"{y}.add_({b})",
            self.pick(f"{y} - {b}", f"{y} * {b}"),
        )
        statements = (
            *[f"{y} += {b}"] * 5,
            *(f"{y}.add_({b})", f"{y}.add_({b}, alpha=2)", f"{y} -= {b}"),
        )
        return self.step(y, expressions, statements, 0.3)

    def similar(self, like: Tensor) -> str:
        """A convolution that keeps the shape."""
        C = like.shape[-3]
        return self.layer("conv", f"nn.Conv2d({C}, {C}, 3, padding=1)").removeprefix("self.")

    def relu(self, y: str) -> str:
        layer = self.pick("nn.ReLU()", "nn.ReLU(inplace=True)")
        known = [f"self.{n}" for n, m in self.names["self"].named_children() if type(m) is nn.ReLU]
        expressions = (
            *[f"TF.relu({y})"] * 3,
            f"torch.relu({y})",
            f"{y}.relu()",
            f"TF.relu({y}, inplace=True)",
            f"TF.relu(input={y})",
            f"{y}.relu_()",
            f"torch.relu_({y})",
            *[f"{known[0] if known else self.layer('relu', layer)}({y})"] * 3,
            self.pick(f"TF.leaky_relu({y}, 0.1)", f"TF.gelu({y})", f"torch.clamp_min({y}, 0)"),
        )
        statements = (f"TF.relu({y}, inplace=True)", f"{y}.relu_()", f"TF.relu_({y})")
        return self.step(y, expressions, statements, 0.1)

    def step(
        self, y: str, expressions: tuple[str, ...], statements: tuple[str, ...], effects: float
    ) -> str:
        """The name of y's successor: of an expression's value, or y that a statement changes."""
        if self.maybe(effects):
            self.write(self.pick(*statements))
            return y
        return self.assign(self.pick(*expressions), y) or y

    def pool(self, y: str) -> str:
        kernel, stride, padding = self.pick(
            ("2", "None", "0"),
            ("2", "2", "0"),
            ("3", "2", "1"),
            ("3", "2", "0"),
            ("3", "1", "1"),
            ("(2, 1)", "1", "0"),
        )
        ceil_mode, dilation = (
            self.pick("False", "False", "True"),
            self.pick("1", "1", "1", "2"),
        )
        optional = {
            "stride": (stride, "None"),
            "padding": (padding, "0"),
            "dilation": (dilation, "1"),
            "ceil_mode": (ceil_mode, "False"),
        }
        if self.maybe(0.15):
            function = self.pick("TF.max_pool2d_with_indices", "TF.max_pool2d", "F.max_pool2d")
            if function != "TF.max_pool2d_with_indices":
                optional["return_indices"] = ("True", "False")
            text = self.call(function, {"input": y, "kernel_size": kernel}, optional)
            name, indices = self.new(), self.new("indices")
            if self.write(f"{name}, {indices} = {text}"):
                self.returned += [indices] * self.maybe(0.5)
                return name
            return y
        if self.maybe(0.3):
            constructor = self.pick("nn.MaxPool2d", "nn.MaxPool2d", "cnn.MaxPool2d")
            known = {name: optional[name] for name in ("stride", "padding", "dilation")}
            known |= {"return_indices": ("False", "False"), "ceil_mode": optional["ceil_mode"]}
            layer = self.layer("pool", self.call(constructor, {"kernel_size": kernel}, known))
            return self.assign(f"{layer}({y})", y) or y
        if self.maybe(0.08):
            return self.assign(f"TF.avg_pool2d({y}, 2)", y) or y
        function = self.pick("TF.max_pool2d", "TF.max_pool2d", "torch.max_pool2d", "F.max_pool2d")
        if function == "torch.max_pool2d" and stride == "None":
            optional["stride"] = (kernel, "None")
        text = self.call(function, {"input": y, "kernel_size": kernel}, optional)
        return self.assign(text, y) or y

    # Interruptions.

    def interruption(self, y: str) -> str:
        """Something that may forbid to fuse what stands before it with what comes after it; returns
        the name under which the chain goes on.
        """
        kind = self.pick(
            *[self.mutation] * 5, self.reader, self.reader, *[self.region] * 2, self.other
        )
        return kind(y) or y

    def mutation(self, y: str) -> None:
        """Of an operand of the chain, of its value, of another image or of a buffer."""
        names = [*self.operands, *self.operands, y, self.pick_recent(self.maps())]
        name = self.pick(*[name for name in names if name != "None"])
        if self.maybe(0.15):
            count = self.layer("count", "self.register_buffer('NAME', torch.zeros(1))")
            self.write(self.pick(f"{count}.add_(1)", f"{count}.add_({y}.detach().mean())"))
            return
        region = name.startswith("self.") and torch.is_grad_enabled()
        if region:
            self.open("torch.no_grad()")
        views = (f"{name}[:1]", f"{name}.flatten()", f"{name}.view({name}.shape)")
        part = self.pick(name, name, *views)
        changes = (
            *(f"{name} += 1", f"{name}[..., 0] = 1", f"{name}.copy_({name} * 2)"),
            *[f"{part}.{self.pick('mul_(0.5)', 'neg_()', 'relu_()', 'zero_()', 'add_(1)')}"] * 6,
            *(f"TF.relu({part}, inplace=True)", *[f"torch.mul({part}, 2, out={part})"] * 2),
        )
        if not region and self.maybe(0.08):
            changes = f"{name}.detach_()", f"{name}.transpose_(-1, -2)"
        self.write(self.pick(*changes))
        if region:
            self.close(len(self.regions) - 1)

    def reader(self, y: str) -> None:
        """Of the chain's value, beside the next member: a computation, the caller, or a hook."""
        kind = self.pick("compute", "compute", "return", "detach", "hook")
        if kind == "compute":
            self.assign(self.pick(f"{y} * 2", f"torch.sigmoid({y})", f"{y} + 1"))
        elif kind == "return":
            self.returned.append(y)
        elif kind == "detach" and (name := self.assign(f"{y}.detach()")):
            self.returned.append(name)
        elif kind == "hook" and self.names[y].requires_grad:
            self.write(f"{y}.register_hook(lambda gradient: gradient * 2)")

    def region(self, y: str) -> None:
        if self.regions and self.maybe(0.6):
            self.close(len(self.regions) - 1)
            return
        if self.maybe(0.06):
            self.lines.append("    " * len(self.regions) + "torch._dynamo.graph_break()")
            return
        contexts = [
            "torch.no_grad()",
            "torch.enable_grad()",
            "torch.autocast('cpu', enabled=False)",
        ]
        if self.dtype == torch.float32:
            contexts += ["torch.autocast('cpu', torch.bfloat16, cache_enabled=False)"] * 3
        self.open(self.pick(*contexts))

    def other(self, y: str) -> str | None:
        """Another operation on the chain's value: a view, a cast, a copy, a layer."""
        first, rows = ("0", "1") if self.names[y].dim() == 3 else ("1", "2")
        expressions = [
            *(f"{y}.transpose(-1, -2)", f"{y}.narrow({first}, 0, 2)", f"{y}.flip({rows})"),
            *(f"{y}.detach()", f"{y}.clone()", f"torch.cat([{y}, {y}], {first})"),
            *(f"{y}.chunk(2, {first})[1]", f"{y}.to({self.dtype})", f"{y}.float()"),
            f"{y}.to(torch.{self.pick('float64', 'float32')})",
        ]
        if self.names[y].dim() == 4:
            norm = f"nn.BatchNorm2d({self.names[y].shape[1]})"
            expressions += [
                *(f"{y}[0]", f"{y}.contiguous(memory_format=torch.channels_last)"),
                *[f"{self.layer('norm', norm)}({y})"] * 2,
            ]
        else:
            expressions += [f"{y}.unsqueeze(0)"] * 6
        return self.assign(self.pick(*expressions), y)
