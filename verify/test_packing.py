"""Claims about how the packed script is made small: nothing of it is lost or changed on the way."""

import ast
import hashlib
import inspect
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.submission import coding, cplusplus, mixing, pack, shake, start

STRIPPED = {
    'a = "x // y";  // c': 'a="x // y";\n',
    '"/*" a "*/"': '"/*" a"*/"\n',
    'extern "C" int f();': 'extern"C" int f();\n',
    'u8"x" L "y"': 'u8"x" L "y"\n',
    "x = a - -b + +c;": "x=a- -b+ +c;\n",
    "char c = '\"'; int n = 1'000;  // it's": "char c='\"';int n=1'000;\n",
    "A<B<c> > d; e< ::f>": "A<B<c> >d;e< ::f>\n",
    "0xE - 1 + 1e-3": "0xE -1+1e-3\n",
    "a / *p /* c */ / b": "a/ *p/b\n",
    "v<T> ? x : y": "v<T> ?x:y\n",
    "a\n  # define F (x) /* y */ // z\nint b;": "a\n# define F (x)\nint b;\n",
    "#define G(x) a \\\n  b##x\nG(1) /* # no\n # no */ c": "#define G(x) a b##x\nG(1)\nc\n",
    "f_@NAME@ (int<@M@>)": "f_@NAME@(int<@M@>)\n",
    "\n// nothing\n\n": "",
    "UNROLL\n\n  for (;;) { // c\n}": "UNROLL\nfor(;;){\n}\n",
}
REFUSED = ('R"(x)"', 'u8R"(x)"', "int a\\\n b;", '"unended', "/* unended", "'")


@pytest.mark.parametrize("source", STRIPPED)
def test_cplusplus_loses_comments_and_spaces_alone(source: str) -> None:
    """Strings, numbers and directives keep what looks like a comment or a gap; lines stay lines."""
    stripped = cplusplus.strip(source)
    assert stripped == STRIPPED[source]
    assert cplusplus.tokens(stripped) == cplusplus.tokens(source)


@pytest.mark.parametrize("source", REFUSED)
def test_cplusplus_that_cannot_be_read_is_refused(source: str) -> None:
    """What the reader might change is an error, not a guess."""
    with pytest.raises(ValueError, match="cannot be stripped"):
        cplusplus.strip(f"int x;\n{source}")


PUNCTUATION = "+-*/<>=&|:.!^%(){}[],;?"
WORDS = ("x", "R", "L", "u8", "1", "0xE", "1e", ".5", '"s"', "'c'", "@M@")
PIECES = st.sampled_from([*PUNCTUATION, *WORDS, " ", "\n", "// c\n", "/* c */"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_stripped_tokens_stay_apart(source: str) -> None:
    """Whatever stands beside what, stripping changes no token, and a second time nothing."""
    try:
        tokens = cplusplus.tokens(source)
    except ValueError:
        return
    stripped = cplusplus.strip(source)
    assert cplusplus.tokens(stripped) == tokens
    assert cplusplus.strip(stripped) == stripped
    assert len(stripped) <= len(source) + 1


def _shaken(**sources: str) -> dict[str, str]:
    trees = {name: ast.parse(source) for name, source in sources.items()}
    shake.drop_unused(trees, ("main",))
    return {name: ast.unparse(tree) for name, tree in trees.items()}


def test_unused_definitions_go_and_used_ones_stay() -> None:
    """Use counts from any module, through strings and from functions kept for a decorator."""
    shaken = _shaken(
        first="""
def main(): return second.used()
def recursive(): return other()
def other(): return recursive()
CONSTANT: int = 3
UNUSED = 4
ONE, PAIR = 5, 6
""",
        second="""
def used(): return "see: CONSTANT"
@registered
def kept(): return helper()
def helper():
    "Not a use of described."
def described(): pass
class Gone: pass
class Base: pass
class Child(Base): pass
print(Child)
""",
    )
    for kept in ("def main", "CONSTANT", "ONE, PAIR"):
        assert kept in shaken["first"]
    for gone in ("recursive", "other", "UNUSED"):
        assert gone not in shaken["first"]
    for kept in ("def used", "def kept", "def helper", "class Base", "class Child"):
        assert kept in shaken["second"]
    for gone in ("described", "Gone"):
        assert gone not in shaken["second"]


def test_names_are_private_when_no_other_module_says_them() -> None:
    """A word elsewhere, even within a string, and the start's own names keep a name as it is."""
    trees = {
        "a": ast.parse("""
def main(): pass
def own(): pass
def told(): pass
own_value = asked = 1
other: int = 2
class Named: pass
"""),
        "b": ast.parse("import a\nprint(a.shared, 'about told', asked)\ndef alone(): pass"),
    }
    assert shake.private_names(trees, ("main",)) == {"a": {"own", "other"}, "b": {"alone"}}


def test_short_names_and_annotations_keep_what_is_read_by_name() -> None:
    """Shortened privates run; operators and device code keep names and annotations, others not."""
    plain = pack.minify(ast.parse("def own(value:int)->int: return value\nX=own(2)"), {"own"})
    names: dict[str, object] = {}
    exec(plain, names)
    assert names["X"] == 2
    assert "own" not in plain
    operator = pack.minify(
        ast.parse(
            "@custom_op('a::b')\ndef op(x_M: Tensor) -> Tensor: return x_M\n"
            "def run(x_M: Tensor) -> Tensor: return op(x_M)\nimport triton\n"
            "@triton.jit\ndef kernel(n: constexpr): pass"
        ),
        {"run"},
    )
    assert "def op(x_M:Tensor)->Tensor:" in operator
    assert "def kernel(n:constexpr):" in operator
    assert "def run(x_M):" in operator


@given(st.text() | st.text("ab", max_size=200))
def test_any_text_comes_back(text: str) -> None:
    """Encoded and decoded, text is the same, whatever its characters and however few."""
    assert mixing.decode(coding.encode(text)) == text


def test_sources_come_back_smaller_than_from_lzma() -> None:
    """What the model learns of a source is worth more than pointers to what stood there before."""
    text = "".join(inspect.getsource(module) for module in (pack, shake, cplusplus))
    data = coding.encode(text)
    assert mixing.decode(data) == text
    assert len(data) < 0.92 * len(lzma.compress(text.encode(), preset=9))


def test_every_machine_encodes_alike() -> None:
    """The bytes of a text are those that another machine made: no step depends on its libraries."""
    text = "".join(f"name_{n} = value_{n * n % 300} + 'é\ufffd'\n" for n in range(300))
    digest = hashlib.sha256(coding.encode(text)).hexdigest()
    assert digest.startswith("2b4e6c5e9dd066dc")


def test_frequent_characters_have_short_paths() -> None:
    """The tree spends the fewest decisions on a text, and every path is another one."""
    assert coding.tree("aaaabbc") == ["", "a", "bc"]
    assert coding.tree("") == []
    assert coding.tree("zz") == ["z"]
    assert mixing.leaves(["", "a", "bc"]) == {0b10: "a", 0b110: "b", 0b111: "c"}


@given(st.binary(min_size=1).filter(lambda data: data[0] > 0))
def test_digits_give_their_bytes_again(data: bytes) -> None:
    """Bytes come back from their digits, of which there are few more than bytes."""
    digits = pack.digits(data)
    assert start.number(digits) == data
    assert len(digits) <= len(data) * 1.004 + 1


def test_digits_survive_in_a_script() -> None:
    """Every pair of digits comes back from the source text in which it is written."""
    digits = "".join(first + second for first in start.DIGITS for second in start.DIGITS)
    source = f"# -*- coding: latin-1 -*-\nX='{digits}'".encode("latin-1")
    names: dict[str, str] = {}
    exec(compile(source, "literal", "exec"), names)
    assert names["X"] == digits
    assert len(start.DIGITS) == 251
