"""That the book is true: each of its chapters may be the last, and README and the workshop work as
they are printed. FULL=1 in the environment runs all of it.
"""
# ruff: noqa: I001

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from itertools import permutations, zip_longest

import httpx
import pytest

import main
from test_main import at_once, listen, sign_up, write_comment, write_post
from servers import README, ROOT, UVICORN, blocks, environment, in_readme, serve

FULL = os.environ.get("FULL") == "1"
BOOK = (ROOT / "main.py").read_text()

# --- Chapters -------------------------------------------------------------------------------------

CHAPTERS = re.split(r"^(?=# --- .+ ---+$)", BOOK, flags=re.MULTILINE)
NAMES = [re.match(r"(?:# --- (.+?) -+\n)?", chapter)[1] for chapter in CHAPTERS]


LAST = ["Application", "Accounts", "Comments", "Cache", "The gate", "python main.py"]
LAST = NAMES[NAMES.index("Application") :] if FULL else LAST
GONE = [{"Docs"}, {"Cache"}, {"Live events", "Rooms"}, {"Mail"}, {"Demo"}, {"The page"}, {"Redis"}]
GONE += [{"Forgotten passwords"}, {"The gate", "Forgotten passwords"}]
if not FULL:  # several at once
    GONE = [set().union(*GONE[0::2]), set().union(*GONE[1::2])]
PATHS = {"Docs": "/docs", "Live events": "/api/v1/events", "The page": "/"}
PATHS |= {"The gate": "/sign-in", "Forgotten passwords": "/forgot-password"}


@pytest.mark.parametrize(
    "left",
    [pytest.param(NAMES[: NAMES.index(name) + 1], id=f"up to {name}") for name in LAST]
    + [pytest.param([n for n in NAMES if n not in gone], id=f"without {gone}") for gone in GONE],
)
def test_chapters_may_be_cut_off_or_taken_out(tmp_path, left):
    texts = [text for name, text in zip(NAMES, CHAPTERS, strict=True) if name in left]
    (tmp_path / "left.py").write_text("".join(texts))
    with serve(tmp_path, *UVICORN, "left:app", PYTHONPATH=str(tmp_path)) as service:
        assert httpx.get(f"{service.url}/openapi.json").json()["info"]["title"] == "Nutshell"
        for name, path in PATHS.items():
            with httpx.stream("GET", service.url + path, headers={"Accept": "text/html"}) as answer:
                assert answer.status_code == (200 if name in left else 404)
        if "Accounts" in left:
            ann = sign_up(service.client)
        if "Posts" in left:
            post = write_post(ann)
            answers = [service.client.get("/posts") for _ in range(2)]
            assert [answer.json()["items"] for answer in answers] == 2 * [[post]]
            assert answers[1].headers.get("x-cache") == ("hit" if "Cache" in left else None)
        if "Comments" in left:
            assert write_comment(ann, post["id"])["post_id"] == post["id"]
        assert ("--- Mail to" in service.log()) == ("Mail" in left)


# --- README ---------------------------------------------------------------------------------------


def section(title):
    return re.search(rf"(?ms)^## {title}\n(.*?)(?=^## |\Z)", README)[1]


VARYING = r"\d{4}-\d\d-\d\dT[\d:.]+Z|[0-9a-f]{16}|[0-9a-f]{8}-\d+"  # times and ids
MAIN_FILES = ("main.py", "test_main.py", ".pytest.ini", "requirements.txt")


def copy_of_main(folder):
    for name in MAIN_FILES:
        shutil.copy(ROOT / name, folder)


def test_the_tour_works_as_it_is_printed(tmp_path):
    tour = section("A tour")
    script = "".join(blocks("sh", tour))
    assert not re.search("--json|--fail-with-body", script)  # curl 7.74 does not know these
    with serve(tmp_path) as service:
        script = script.replace("http://localhost:8000", service.url)
        shell = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    said = re.sub(VARYING, "…", shell.stdout)
    for text in blocks(r"(?!sh)\w+", tour):
        assert re.sub(VARYING, "…", text) in said, (text, shell)
    assert said.count('"access_token"') == 1
    assert '"bio":"I keep bees."' in said
    assert '"total":1,' in said
    assert "\n204\n" in said
    assert said.endswith('"error_code": "INVALID_TOKEN", "request_id": "…"}\n')


def test_own_routes_and_their_tests_work_as_printed(tmp_path):
    copy_of_main(tmp_path)
    for name in ("mine", "test_mine", "test_client"):
        text = in_readme("python", f"# {name}.py:")
        (tmp_path / f"{name}.py").write_text(text)
        command = re.match("# .+?: (.+)", text)[1].replace(".venv/bin/python", sys.executable)
        if name != "mine":
            env = environment(PYTHONPATH="")
            shell = ["sh", "-c", command]
            done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True)
            assert b"1 passed" in done.stdout, done.stdout
    with serve(tmp_path, *UVICORN, "mine:app", PYTHONPATH=str(tmp_path)) as service:
        assert sign_up(service.client).api.get("/mine/drafts").json() == 0


def test_uv_is_told_of_the_packages_of_requirements_txt():
    (block,) = re.findall(r"(?s)# dependencies = \[(.+?)# \]", BOOK)
    packages = (ROOT / "requirements.txt").read_text().partition("# tests")[0].split()
    assert sorted(re.findall('"(.+?)"', block)) == sorted(packages)


def test_optional_packages_are_pinned_everywhere_alike():
    pins = re.findall(r"pip install (\w+==[\d.]+)", BOOK)
    assert [pin.partition("==")[0] for pin in pins] == ["asyncpg", "redis"]
    for text in README, (ROOT / "Dockerfile").read_text(), (ROOT / ".ci" / "run").read_text():
        assert " ".join(pins) in text


def test_every_setting_and_its_default_stand_in_readme():
    printed = {}
    for names, cell in re.findall(r"(?m)^\| ([A-Z_, ]+) \| (.+?) \|", section("Configure it")):
        defaults = re.findall("`(.+?)`", cell) if cell.startswith("`") else []
        printed |= dict(zip_longest(names.split(", "), defaults))
    fields = {name.upper(): field.default for name, field in main.Settings.model_fields.items()}
    empty = (None, "")
    defaults = {n: None if d in empty else str(d).lower() for n, d in fields.items()}
    assert printed == defaults


def test_thirty_people_behind_one_address_sign_in_and_listen(tmp_path):
    command = re.search(r"(?m)^((?:\w+=\S+ )+)\S+python main.py$", section("Teach with it"))[1]
    settings = dict(setting.split("=") for setting in command.split())
    limits = {"RATE_LIMIT": "600/minute", "AUTH_RATE_LIMIT": "30/minute"}  # where it says nothing
    with serve(tmp_path, **limits | settings) as service:
        people = at_once(30, lambda _: sign_up(service.client))
        with ExitStack() as stack:
            hearing = [stack.enter_context(listen(person.api)) for person in people]
            write_post(people[0])
            for listener in hearing:
                assert listener.wait(1)[0][0] == "post.published"


@pytest.mark.skipif(not FULL, reason="it installs all packages twice, from the network")
def test_without_a_network_it_is_installed_and_without_an_environment_uv_runs_it(tmp_path):
    copy_of_main(tmp_path)
    shell = partial(subprocess.run, cwd=tmp_path, check=True, timeout=600)
    shell(["sh", "-euc", in_readme("sh", "pip download")])
    shell(["unshare", "--net", "sh", "-euc", in_readme("sh", "--no-index")])
    python = str(tmp_path / ".venv/bin/python")
    with serve(tmp_path, python, "main.py", DEMO="true", PYTHONPATH="") as service:
        assert httpx.get(f"{service.url}/docs/swagger-ui-bundle.js").status_code == 200
    shell([python, "-m", "pip", "install", "-q", "uv"])
    (tmp_path / "lone").mkdir()
    shutil.copy(ROOT / "main.py", tmp_path / "lone")
    uv = [str(tmp_path / ".venv/bin/uv"), "run", "main.py"]
    with serve(tmp_path / "lone", *uv, PYTHONPATH="") as service:
        assert service.client.get("/posts").json()["total"] == 0


# --- Workshop -------------------------------------------------------------------------------------

STUDENTS = (ROOT / ".ci" / "workshop.md").read_text()
FIRST_PART, REST = re.split("(?m)^(?=# --- Users -)", BOOK)


def change(text, *diffs):
    """main.py after these changes. Each stands in a diff below a line that begins with @@."""
    for diff in diffs:
        for part in re.split("(?m)^@@.*\n", diff)[1:]:
            lines = part.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            assert text.count(old) == 1, f"it is not there, or not only once:\n{old}"
            text = text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))
    return text


EXERCISES = blocks("python", section("Teach with it"))
SOLUTIONS = blocks("diff", section("Teach with it"))
TUTORIAL, *HALVES = blocks("diff", STUDENTS)
PRINTED = [re.search(r"def (test_\w+)", exercise)[1] for exercise in EXERCISES]
MISSING = {  # what pytest says at the end of its lines before the exercise
    "subtitle": '"subtitle".*"msg": "Extra inputs are not permitted"',
    "title": r"assert \('giraffe', \d+, \d+\) == \('giraffe', 0, 0\)",
    "owner": "assert 405 == 401$",
    "minute": "assert 201 == 429$",
    "joined": "assert 'post.published' == 'user.joined'",
}


def run_exercises(folder, main_py, *names):
    """Runs these tests, with the printed ones at the end of test_main.py; all if none is named.
    Returns why they failed, by name."""
    copy_of_main(folder)
    (folder / "main.py").write_text(main_py)
    with (folder / "test_main.py").open("a") as tests:
        tests.write("\n\n".join(["", *EXERCISES]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", " or ".join(names)]
    env = environment(PYTHONPATH="", COLUMNS="10000")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    print(done.stdout)
    failed = dict(re.findall(r"(?m)^FAILED test_main.py::(.+?) - (.*)", done.stdout))
    assert done.returncode == bool(failed), done.stdout + done.stderr
    return failed


def test_before_the_workshop_each_exercise_fails_for_what_is_missing(tmp_path):
    failed = run_exercises(tmp_path, BOOK, *PRINTED)
    assert failed.keys() == set(PRINTED)
    for name, (word, reason) in zip(PRINTED, MISSING.items(), strict=True):
        assert word in name
        assert re.search(reason, failed[name]), failed[name]


def test_the_workshop_builds_on_the_first_part_and_then_adds_the_rest(tmp_path):
    *before, last = SOLUTIONS
    first_part = change(FIRST_PART, *before)
    assert run_exercises(tmp_path, first_part, *PRINTED[:4]) == {}
    book = change(first_part + REST, last)
    for order in permutations(SOLUTIONS):
        assert change(BOOK, *order) == book
    assert run_exercises(tmp_path, book) == {}


def test_what_the_tutorial_teaches_is_enough_for_the_workshop(tmp_path):
    names = [] if FULL else PRINTED
    assert run_exercises(tmp_path, change(BOOK, TUTORIAL), *names) == {}


@pytest.mark.parametrize("number", range(len(HALVES)))
def test_half_of_a_solution_fails_in_the_workshop(tmp_path, number):
    failed = run_exercises(tmp_path, change(BOOK, *SOLUTIONS, HALVES[number]), *PRINTED)
    assert failed.keys() == set(PRINTED)
