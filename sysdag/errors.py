"""Every error sysdag raises on purpose. Each names the node, row or option, what was expected, and what to do."""


class SysdagError(Exception):
    """Base of all errors that sysdag raises on purpose.

    Attributes:
        input_row: of an error in a run, the number of the row of inputs that alone is at fault; None where it is not
            known to be one.
    """

    input_row: int | None = None


class GraphError(SysdagError, ValueError):
    """The graph of a system is malformed: a cycle, an unknown parent, a duplicate name."""


class PlanError(SysdagError, ValueError):
    """A plan cannot do what was asked: wrong inputs, or a likelihood that the objective needs and a node lacks."""


class DataError(SysdagError, ValueError):
    """A value or dataset row cannot be used; the message names the row and the node.

    Attributes:
        element: where a component raised it, the index of the value in the list that it was given.
    """

    def __init__(self, message: str, *, element: int | None = None) -> None:
        super().__init__(message)
        self.element = element


class TrainingError(SysdagError, RuntimeError):
    """Training would go wrong: the step-0 check failed, or a score is not finite."""


class RunError(SysdagError, RuntimeError):
    """A node failed while the system ran; the message names the node and the input's row."""


class SerializationError(SysdagError, ValueError):
    """A saved system cannot be written or read back; the message names the node or file."""


class DeclarationNeeded(SerializationError):
    """A saved component cannot be built from its folder alone; loading takes what its node's module declares."""


class EndpointError(SysdagError, RuntimeError):
    """A server cannot be asked, does not answer, or answers with what cannot be used; the message names it.

    Attributes:
        status: of HTTP, where that is what it answered.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JudgeError(SysdagError, RuntimeError):
    """A judge cannot be used, failed, or gave no usable answer; the message names it and the run."""


class LabelError(SysdagError, RuntimeError):
    """Preferences cannot be collected or kept: another trace's database, a port in use; the message says what to do."""


class LoadingError(SysdagError, ValueError):
    """A command was told of a system that is not there, or that cannot be imported."""


class OptionError(SysdagError, ValueError):
    """A command's options, or its configuration file, cannot be used; the message names the option and the line."""


_ELEMENT = "_sysdag_element"


def mark_element(error: Exception, element: int) -> None:
    """Says of an error of any kind which value, by its index in the list that a component was given, was at fault."""
    error.__dict__[_ELEMENT] = element


def failed_element(error: BaseException) -> int | None:
    """What `mark_element` said of an error, or a `DataError` of itself."""
    marked = getattr(error, _ELEMENT, None)
    return getattr(error, "element", None) if marked is None and isinstance(error, DataError) else marked


def shown(value: object, length: int = 100) -> str:
    """A value in an error: the beginning of its repr, or its type where that has none."""
    try:
        return repr(value)[:length]
    except Exception:  # noqa: BLE001 - an integer of very many digits has none, and a user's object may raise anything
        return f"a value of type {type(value).__name__}"
