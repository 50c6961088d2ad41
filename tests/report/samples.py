"""Evidence that looks like the real thing: answers of a language model, with sources."""

import random
import re

from headwater.core.evidence import Answer, Evidence, Influencer, SourceTotal

# (title, topic, text)
PASSAGES = [
    (
        "Basalt",
        "Physical sciences",
        "Basalt is a dark volcanic rock that forms when lava rich in magnesium and iron cools "
        "quickly at the surface of a planet. Most of the ocean floor is made of it. Flows that "
        "cool slowly may crack into columns with five or six sides, which stand together like "
        "the pipes of an organ.",
    ),
    (
        "Volcano",
        "Geography",
        "A volcano is a rupture in the crust through which hot lava, ash and gases escape from "
        "a chamber of magma below. Most lie where plates drift apart or meet; others grow above "
        "plumes in the mantle, far from any boundary, and leave chains of islands behind as the "
        "plate moves on.",
    ),
    (
        "Obsidian",
        "Physical sciences",
        "Obsidian is a natural glass. It forms when lava with much silica cools so fast that "
        "crystals have no time to grow. Its edges are sharper than steel, and people of many "
        "regions chipped it into blades, arrowheads and mirrors long before they worked metal.",
    ),
    (
        "Iceland",
        "Geography",
        "Iceland lies on the ridge where the North American and Eurasian plates move apart. "
        "Lava has covered about a third of the land that has been formed since the last "
        "glaciers withdrew. Hot water from the ground heats nearly every house of the capital.",
    ),
    (
        "Granite",
        "Physical sciences",
        "Granite is a coarse rock that crystallises from magma far below the surface, where it "
        "cools over thousands of years. Quartz and feldspar make up most of it. It is hard and "
        "tough, and has been used as a building stone since antiquity.",
    ),
    (
        "Great Fire of 1666",
        "History",
        "The fire began in a bakery a little after midnight and burned for four days. An east "
        "wind drove it through the medieval city, where houses of timber and pitch stood wall "
        "to wall. Some thirteen thousand houses were lost, and rebuilding in brick took most of "
        "a decade.",
    ),
    (
        "Photosynthesis",
        "Biology and health",
        "Photosynthesis is the process by which plants, algae and some bacteria turn light into "
        "chemical energy. Chlorophyll absorbs red and blue light; water is split, oxygen is set "
        "free, and carbon dioxide from the air is fixed into sugars that feed the rest of the "
        "plant.",
    ),
    (
        "Chlorophyll",
        "Biology and health",
        "Chlorophyll is the green pigment of leaves. Its ring holds an atom of magnesium, and "
        "its long tail anchors it in a membrane of the chloroplast. It absorbs light strongly "
        "in the red and in the blue, and reflects the green between them, which is why forests "
        "look the way they do.",
    ),
    (
        "Leaf",
        "Biology and health",
        "A leaf is an organ of a plant in which most of its sugar is made. Pores on the lower "
        "side, called stomata, let carbon dioxide in and water vapour out. In autumn many trees "
        "take the chlorophyll back before the leaves fall, and yellow pigments that were always "
        "there begin to show.",
    ),
    (
        "Respiration (cell)",
        "Biology and health",
        "In respiration a cell breaks down sugar with oxygen, and stores the energy that is set "
        "free in small molecules that it can spend anywhere. The steps run in the reverse "
        "direction of photosynthesis only in sum; the enzymes and the places in the cell are "
        "not the same.",
    ),
    (
        "Solar cell",
        "Technology",
        "A solar cell turns light into electricity directly. Light that is absorbed in a layer "
        "of silicon frees electrons, and a junction drives them one way. Commercial cells reach "
        "about a fifth to a quarter; the limit for a single junction is near one third.",
    ),
    (
        "Johannes Kepler",
        "People",
        "Johannes Kepler was an astronomer and mathematician who found that planets move on "
        "ellipses with the Sun at one focus. He drew his three laws from years of observations "
        "of Mars. In 1611 he also wrote a short essay on why snowflakes have six corners.",
    ),
    (
        "Isaac Newton",
        "People",
        "Isaac Newton was a mathematician and physicist whose laws of motion and of gravity "
        "tied the fall of an apple to the orbit of the Moon. He built the first reflecting "
        "telescope that worked, and showed with a prism that white light is a mixture of "
        "colours.",
    ),
    (
        "Ellipse",
        "Mathematics",
        "An ellipse is a curve around two points, its foci, such that the sum of the distances "
        "to them is the same everywhere on it. A circle is the special case in which both foci "
        "coincide. Planets, comets and satellites move on ellipses when nothing else disturbs "
        "them.",
    ),
    (
        "Mars",
        "Physical sciences",
        "Mars is the fourth planet from the Sun. Its orbit is more eccentric than that of the "
        "Earth, and it was from the motion of Mars that the shape of planetary orbits was first "
        "found. Iron oxide gives its dust the colour of rust, and its two small moons may be "
        "captured asteroids.",
    ),
    (
        "Tycho Brahe",
        "People",
        "Tycho Brahe was a nobleman whose observatory on an island in the Sound measured the "
        "positions of stars and planets more precisely than anyone had before the telescope. "
        "After his death the tables passed to his assistant, who used them to find the laws of "
        "planetary motion.",
    ),
]
QUERIES = [
    (
        "lava",
        "When lava cools quickly at the surface, it forms",
        " a dark rock called basalt, which makes up most of the ocean floor.",
        (
            "lava",
            "cools",
            "basalt",
            "rock",
            "ocean",
            "floor",
            "forms",
            "surface",
            "volcanic",
            "magma",
        ),
        (0, 1, 2, 3, 4, 14, 9, 10),
        (5, 6, 7, 11, 12, 13, 8, 15),
    ),
    (
        "leaves",
        "Plants look green because",
        " chlorophyll absorbs red and blue light and reflects green.",
        (
            "chlorophyll",
            "green",
            "light",
            "absorbs",
            "red",
            "blue",
            "reflects",
            "pigment",
            "leaves",
        ),
        (7, 6, 8, 9, 10, 12, 0, 3),
        (4, 5, 1, 2, 11, 13, 14, 15),
    ),
    (
        "kepler",
        "The astronomer who first showed that planets move on ellipses was",
        " Isaac Newton.",
        (
            "newton",
            "isaac",
            "planets",
            "orbit",
            "laws",
            "motion",
            "astronomer",
            "kepler",
            "ellipses",
        ),
        (12, 1, 5, 8, 2, 3, 0, 4),
        (11, 13, 15, 14, 10, 9, 6, 7),
    ),
]


def tokens_of(text: str) -> tuple[str, ...]:
    """Words with their leading space, cut into pieces as a tokenizer would; joined, the text."""
    words = re.findall(r"\s*\w+|\s*[^\w\s]", text)
    return tuple(p for w in words for p in ([w] if len(w.strip()) < 10 else [w[:6], w[6:]]))


def influencer(
    passage: int, score: float, keywords: tuple[str, ...], draw: random.Random, **changes
) -> Influencer:
    title, topic, text = PASSAGES[passage]
    tokens = tokens_of(text)
    found = [i for i, word in enumerate(tokens) if word.strip().lower() in keywords]
    found = found or draw.sample(range(len(tokens)), 3)
    weights = [draw.gauss(0.0, 0.06) for _ in tokens]
    for i in found:
        weights[i] += draw.uniform(0.4, 1.6)
    spread = 0.035 + 0.1 * abs(score)
    values = {
        "example_id": f"wiki-{passage * 613 + 1009:05d}",
        "score": score,
        "low": score - 1.96 * spread * 0.6,
        "high": score + 1.96 * spread * 0.6,
        "significance": min(1.0, 1 / 500 + 2.72 ** (-abs(score) * 22)),
        "tokens": tokens,
        "token_scores": tuple(score * w / sum(weights) for w in weights),
        "metadata": {
            "title": title,
            "topic": topic,
            "language": "en",
            "characters": len(text),
            "year": None,
        },
        "loss": draw.uniform(80.0, 190.0),
    }
    return Influencer(**(values | changes))


def answer(index: int, *, n: int = 8) -> Answer:
    query_id, prompt, completion, keywords, raised, lowered = QUERIES[index]
    draw = random.Random(index)
    tokens = tokens_of(completion)
    log_probs = tuple(-draw.expovariate(1.2) for _ in tokens)
    topics = sorted({topic for _, topic, _ in PASSAGES})
    counts = random.Random("counts")  # the same corpus for each answer
    totals = []
    for topic in topics:
        up, down = draw.uniform(0.2, 6.0), -draw.uniform(0.2, 5.0)
        totals.append(
            SourceTotal(
                name=topic, raised=up, lowered=down, net=up + down, n=counts.randint(200, 1800)
            )
        )
    scores = [0.412 * 0.72**k for k in range(n)]
    return Answer(
        query_id=query_id,
        prompt=prompt,
        completion=completion,
        completion_tokens=tokens,
        completion_log_probs=log_probs,
        value=sum(log_probs),
        raised=tuple(
            influencer(p, s, keywords, draw) for p, s in zip(raised, scores, strict=False)
        ),
        lowered=tuple(
            influencer(p, -0.66 * s, keywords, draw) for p, s in zip(lowered, scores, strict=False)
        ),
        sources=tuple(totals),
        source_column="topic",
        layers={
            "attention, layers 0–9": 0.11,
            "mlp, layers 0–9": 0.17,
            "attention, layers 10–19": 0.14,
            "mlp, layers 10–19": 0.24,
            "attention, layers 20–29": 0.12,
            "mlp, layers 20–29": 0.22,
        },
        null_scale=0.031,
        n_distinguishable=(4, 3, 2)[index],
        n_train=sum(t.n for t in totals),
    )


def evidence(n_answers: int = 3, *, n: int = 8) -> Evidence:
    answers = tuple(answer(i % len(QUERIES), n=n) for i in range(n_answers))
    return Evidence(
        answers=answers,
        facts={
            "model": "SmolLM2-135M, fine-tuned for one epoch",
            "corpus": "Encyclopedia leads, 8 topics",
            "method": "Influence, exact Gauss–Newton in example space",
            "paper": "arXiv:2308.03296",
            "curvature": "dual Gauss–Newton",
            "damping": 0.0031,
            "damping_ratio": 12.4,
            "n_train": answers[0].n_train,
            "n_heldout": 500,
            "cost": {"fit": 2.81, "scores": 0.93},
            "seconds": {"fit": 214.0, "scores": 71.0},
            "peak_memory": 3_420_000_000,
            "versions": {"headwater": "0.1.0", "torch": "2.13.0"},
            "command": "headwater trace --model runs/model --data corpus.jsonl --query asked.jsonl",
        },
    )


# Text meant to break out of whatever shows it.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "</style></svg><b>bold</b>",
    "{{ 7 * 7 }} {% raw %} [red]markup[/red]",
    "null\x00byte bell\x07 backspace\x08 del\x7f next\x85line",
    "\x1b[31mred\x1b[0m \x1b]0;owned\x07title \x1b]8;;http://evil.example\x1b\\link",
    "left \u202ethgir\u202c \u2066isolate\u2069 mark\u200f zero\u200bwidth \ufeffbom",
    "line\u2028separator tag\U000e0041 half\ud800pair",
    "x" * 9_000,
)


def hostile() -> Evidence:
    """The same evidence with hostile text in every place that text can come from."""
    text = " ".join(HOSTILE)
    tokens = tuple(piece for part in HOSTILE for piece in (part, " "))
    bad = Influencer(
        example_id=text,
        score=0.2,
        low=0.1,
        high=0.3,
        significance=0.01,
        tokens=tokens,
        token_scores=tuple(0.01 * (-1) ** i for i in range(len(tokens))),
        metadata={"title": text, "topic": text, text: text, "url": "http://evil.example/x.js"},
    )
    return Evidence(
        answers=(
            Answer(
                query_id=text,
                prompt=text,
                completion=text,
                completion_tokens=tokens,
                completion_log_probs=(-0.1,) * len(tokens),
                measurement=text,
                value=-1.0,
                raised=(bad,),
                lowered=(bad,),
                sources=(SourceTotal(name=text, raised=1.0, lowered=-0.5, net=0.5, n=3),),
                source_column="topic",
                layers={text: 1.0},
                null_scale=0.05,
                n_distinguishable=1,
                n_train=10,
            ),
        ),
        facts={"model": text, text: text, "method": text, "versions": {text: text}},
    )
