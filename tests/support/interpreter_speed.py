"""Triton's interpreter, sooner: what it computes anew for every operation is remembered. Its results stay the same.

Types of blocks, what an operation does with the types of its operands, and constants are the same ones over and over,
while numpy's part of an operation on a small tile is short.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

_Tensor, _Handle = core.tensor, interpreter.TensorHandle
_MOST_CONSTANTS = 20_000


def install() -> None:
    """For the life of the process; once."""
    _remember_block_types()
    _remember_shapes()
    _remember_numpy_types()
    _remember_operands()
    _cast_at_once()
    # Arguments lie on the CPU: there is nothing to be copied there and back.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    interpreter.InterpreterBuilder.create_ashr = _shift_right
    core._unwrap_if_constexpr = _unwrapped
    # Overflow is looked for by doing all sums of integers twice, and then not told.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _unwrapped(o: Any) -> Any:
    """`core._unwrap_if_constexpr`."""
    if isinstance(o, core.constexpr):
        return o.value
    if isinstance(o, (_Tensor, int, float, core.dtype)):
        return o
    return _unwrap(o)


_unwrap = core._unwrap_if_constexpr


def _remember_block_types() -> None:
    """There is one `block_type` for an element and a shape."""
    known: dict[tuple[Any, ...], Any] = {}
    init = core.block_type.__init__

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        try:
            key = (type(element_ty), element_ty.name, *[s.value if type(s) is core.constexpr else s for s in shape])
            found = known.get(key)
        except TypeError:  # it is refused below
            return object.__new__(cls)
        if found is None:
            found = known[key] = object.__new__(cls)
        return found

    def init_once(self: Any, element_ty: Any, shape: Any) -> None:
        if "name" not in self.__dict__:
            init(self, element_ty, shape)

    core.block_type.__new__ = new
    core.block_type.__init__ = init_once


def _remember_shapes() -> None:
    """A tensor's shape is its type's."""
    init = _Tensor.__init__

    def of_type(self: Any, handle: Any, type: Any) -> None:
        shape = type.__dict__.get("shape_of_tensors")
        if shape is None:
            init(self, handle, type)
            type.shape_of_tensors = (self.shape, self.numel)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape

    _Tensor.__init__ = of_type


def _remember_numpy_types() -> None:
    known: dict[str, Any] = {}
    find = interpreter._get_np_dtype

    def get_np_dtype(tt_dtype: Any) -> Any:
        found = known.get(tt_dtype.name)
        if found is None:
            found = known[tt_dtype.name] = find(tt_dtype)
        return found

    interpreter._get_np_dtype = get_np_dtype


def _remember_operands() -> None:
    """What is done with two operands, by their types: each is cast and then spread, or left as it is."""
    semantic = interpreter.interpreter_semantic
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    plans: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}

    def one(given: Any, wanted: Any) -> tuple[Any, Any]:
        scalar = None if given.type.scalar == wanted.type.scalar else wanted.type.scalar
        spread = wanted.type.is_block() and (
            not given.type.is_block() or given.type.shape.values != wanted.type.shape.values
        )
        return scalar, wanted.type if spread else None

    def done(given: Any, to: Any, spread: Any) -> Any:
        if to is not None:
            given = semantic.cast(given, to)
        if spread is None:
            return given
        data = given.handle.data
        shape = spread.shape.values
        if given.type.is_block():
            data = np.broadcast_to(data, shape)
        else:
            data = np.full(shape, data, data.dtype)
        return _Tensor(_Handle(data, spread.scalar), spread)

    def by_plan(find: Any, key: tuple[Any, ...], lhs: Any, rhs: Any) -> tuple[Any, Any]:
        plan = plans.get(key)
        if plan is None:
            left, right = find()
            plans[key] = (*one(lhs, left), *one(rhs, right))
            return left, right
        to_left, spread_left, to_right, spread_right = plan
        if to_left is not None or spread_left is not None:
            lhs = done(lhs, to_left, spread_left)
        if to_right is not None or spread_right is not None:
            rhs = done(rhs, to_right, spread_right)
        return lhs, rhs

    def broadcast_by_plan(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return by_plan(lambda: broadcast(lhs, rhs), (lhs.type.name, rhs.type.name, "broadcast"), lhs, rhs)

    def check_by_plan(lhs: Any, rhs: Any, *flags: Any, **more: Any) -> tuple[Any, Any]:
        if type(lhs) is _Tensor and type(rhs) is _Tensor:
            key = (lhs.type.name, rhs.type.name, *flags, *more.items())
            return by_plan(lambda: check(lhs, rhs, *flags, **more), key, lhs, rhs)
        if isinstance(rhs, numbers.Number) and type(lhs) is _Tensor:
            key = (lhs.type.name, type(rhs), rhs, 0, *flags, *more.items())
            if (found := constants.get(key)) is not None and found[0] is lhs.type:
                return lhs, found[1]
            left, right = check(lhs, rhs, *flags, **more)
            if left is lhs:
                constants[key] = lhs.type, right
        else:
            left, right = check(lhs, rhs, *flags, **more)
        if len(constants) > _MOST_CONSTANTS:
            constants.clear()
        return left, right

    semantic.binary_op_type_checking_impl = check_by_plan
    semantic.broadcast_impl_value = broadcast_by_plan


def _cast_at_once() -> None:
    """Numbers that numpy knows are cast by numpy."""
    semantic = interpreter.interpreter_semantic
    cast = semantic.cast
    numpy_casts = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp16", "fp32", "fp64"}

    def cast_at_once(input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        source, to = input.type.scalar, dst_ty.scalar
        if source is to:
            return input
        if (
            fp_downcast_rounding is None
            and to.name in numpy_casts
            and (source.name in numpy_casts or source.name == "int1")
            and source.name != to.name
        ):
            data = input.handle.data.astype(interpreter._get_np_dtype(to))
            return _Tensor(_Handle(data, to), input.type.with_element_ty(to) if input.type.is_block() else to)
        return cast(input, dst_ty, fp_downcast_rounding)

    semantic.cast = cast_at_once


def _shift_right(self: Any, lhs: Any, rhs: Any) -> Any:
    """`create_ashr`, which leaves its operands as they are: constants are remembered."""
    left, right = (x.data.astype(interpreter._get_signed_np_dtype(x.data.dtype)) for x in (lhs, rhs))
    return self.binary_op(_Handle(left, lhs.dtype), _Handle(right, rhs.dtype), np.right_shift)


def _divided(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b  # as `create_idiv`


# Name in a program -> of the semantic's function, what comes after its operands, what it computes where nothing is cast
_OPERATORS: dict[str, tuple[str, tuple[Any, ...], Callable[[Any, Any], Any]]] = {
    "add": ("add", (True,), np.add),
    "sub": ("sub", (True,), np.subtract),
    "mul": ("mul", (True,), np.multiply),
    "truediv": ("truediv", (), np.divide),
    "floordiv": ("floordiv", (), _divided),
    "mod": ("mod", (), np.fmod),
    "and": ("and_", (), np.bitwise_and),
    "or": ("or_", (), np.bitwise_or),
    "xor": ("xor_", (), np.bitwise_xor),
    "lt": ("less_than", (), np.less),
    "le": ("less_equal", (), np.less_equal),
    "gt": ("greater_than", (), np.greater),
    "ge": ("greater_equal", (), np.greater_equal),
    "eq": ("equal", (), np.equal),
    "ne": ("not_equal", (), np.not_equal),
}
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}  # whose numbers become tensors of their own type first


def operators() -> dict[str, Any]:
    """Methods of a tensor for the time of a launch: name -> function."""
    made: dict[str, Any] = {"__getitem__": _with_new_axes()}
    for name in _OPERATORS:
        made[f"__{name}__"] = _operator(name, reverse=False)
        if name not in _COMPARISONS:
            made[f"__r{name}__"] = _operator(name, reverse=True)
    return made


def _made(data: Any, type: Any) -> Any:
    """A tensor, without its checks."""
    handle = object.__new__(_Handle)
    handle.data, handle.dtype, handle.attr = data, type.scalar, {}
    return _Tensor(handle, type)


def _operator(name: str, *, reverse: bool) -> Callable[[Any, Any], Any]:
    """An operator that asks Triton for each pair of types once, and where numpy gives the same computes by numpy."""
    method, more, compute = _OPERATORS[name]
    semantic = interpreter.interpreter_semantic
    plans: dict[Any, Any] = {}  # -> what computes, the result's type, a constant operand; None: by Triton

    def slow(left: Any, right: Any) -> Any:
        if name in _COMPARISONS:
            right = semantic.to_tensor(right)
        return getattr(semantic, method)(left, right, *more)

    def planned(left: Any, right: Any, found: Any) -> Any:
        """What to remember; `found` by Triton."""
        constant = None
        if not isinstance(right, _Tensor):
            own = name in _COMPARISONS or left.dtype.is_ptr()
            right = semantic.to_tensor(right) if own else semantic.scalar_constant(right, left.dtype)
            constant = right.handle.data
        how = compute
        if name == "add" and left.dtype.is_ptr() and right.dtype.is_int_signed():
            width = max(1, left.dtype.element_ty.primitive_bitwidth // 8)
            how = lambda a, b: a + width * b.astype(np.uint64)  # noqa: E731
        elif left.dtype != right.dtype or left.dtype.is_ptr():
            return None
        data, wanted = how(left.handle.data, right.handle.data), found.handle.data
        same = data.dtype == wanted.dtype and data.shape == wanted.shape and data.tobytes() == wanted.tobytes()
        return (how, found.type, constant) if same else None

    def run(self: Any, other: Any) -> Any:
        if type(other) is core.constexpr:
            other = other.value
        kind = type(other)
        if kind is _Tensor:
            key: Any = (self.type.name, other.type.name)
        elif (kind is int or kind is float) and not reverse:
            key = (self.type.name, kind, other)
        else:
            return slow(other, self) if reverse else slow(self, other)
        plan = plans.get(key, 0)
        left, right = (other, self) if reverse else (self, other)
        if plan:
            how, result, constant = plan
            return _made(how(left.handle.data, right.handle.data if constant is None else constant), result)
        found = slow(left, right)
        if plan == 0:
            if len(plans) > _MOST_CONSTANTS:
                plans.clear()
            plans[key] = planned(left, right, found)
        return found

    return run


def _with_new_axes() -> Callable[[Any, Any], Any]:
    """x[:, None] and the like."""
    semantic = interpreter.interpreter_semantic
    types: dict[Any, Any] = {}

    def getitem(self: Any, slices: Any) -> Any:
        slices = slices if isinstance(slices, tuple) else (slices,)
        new = tuple(each is None for each in slices)
        if not all(each is None or each == slice(None) for each in slices):
            raise ValueError(f"unsupported tensor index: {slices}")
        found = types.get((self.type.name, new))
        if found is not None:
            return _made(self.handle.data[slices], found)
        made = self
        for dim, each in enumerate(slices):
            if each is None:
                made = semantic.expand_dims(made, dim)
        if self.type.is_block():
            types[self.type.name, new] = made.type
        return made

    return getitem
