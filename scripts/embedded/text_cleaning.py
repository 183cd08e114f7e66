"""Cleaning of the classical Chinese texts of the embedded base model's corpus.

Needs ``pip install opencc-python-reimplemented``.
"""

import re
import sys
from collections import Counter
from itertools import pairwise

try:
    import opencc
except ImportError:
    sys.exit("prepare_corpus.py needs OpenCC: pip install opencc-python-reimplemented")

HAN = "\u3007\u3400-\u9fff\U00020000-\U0003ffff"
MAX_TITLE, MIN_HAN = 40, 10
PROSE = {"蒙学", "四书五经", "论语"}
# Lists of poems without titles or boundaries, and a dictionary of seal-script forms.
DROPPED_BOOKS = {"唐诗三百首", "千家诗", "文字蒙求"}
PUNCTUATION = str.maketrans(",?!;:．「」『』()［］・\u3000\xa0\t", "，？！；：。“”‘’（）（）·   ")
# Variant forms (pairs: variant, standard) that OpenCC's t2s leaves alone.
VARIANT_PAIRS = """疎疏劒剑鴈雁猨猿遶绕慙惭簷檐荅答鬬斗櫂棹谿溪徧遍幷并媿愧蘂蕊嬾懒堦阶珮佩覩睹臯皋褭袅
敧欹廻回飜翻髪发煖暖秪只秖只暎映隣邻妬妒牋笺竝并呌叫燄焰桮杯嚬颦巵卮顇悴罇樽顦憔逈迥僊仙羇羁鼇鳌鏁锁
詶酬鵶鸦隄堤姪侄栢柏緜绵缾瓶讐仇壻婿粧妆牓榜棃梨邨村麤粗麄粗鸎莺碁棋筯箸彊强藂丛帬裙槃盘懃勤牕窗窓窗
窻窗趂趁輙辄醆盏飡餐毘毗懽欢讙欢衞卫欵款悮误虵蛇徴征慇殷椀碗盌碗崄险効效蔕蒂袴裤峩峨輭软汚污穉稚勅敕
諠喧搆构拏拿怱匆悤匆鼈鳖犂犁蜺霓旛幡嵒岩嵓岩擡抬畧略襃褒廐厩胷胸鎗枪蕚萼筭算羃幂遯遁塲场澣浣噉啖覰觑
恡吝椶棕鳯凤瑯琅愬诉駮驳鷰燕尅克颕颖秔粳皐皋呪咒菓果撃击頳赪嗁啼陁陀翺翱謌歌穽阱蠭蜂貍狸覊羁臙胭殽肴
敍叙匳奁迺乃碪砧澁涩羗羌蟇蟆勗勖荳豆沍冱倂并甎砖塼砖濶阔啣衔刼劫駈驱緫总氊毡韈袜韤袜箒帚躭耽蜨蝶葅菹
顋腮阨厄蹏蹄柟楠畊耕茘荔餽馈憇憩麞獐墖塔寘置甖罂餙饰狥徇覔觅踈疏燿耀斲斫倐倏蹔暂歛敛鑪炉轝舆勑敕盃杯
埽扫"""
VARIANTS = {ord(a): b for a, b in re.findall(r"(\S)(\S)", VARIANT_PAIRS.replace("\n", ""))}
OPENCC = opencc.OpenCC("t2s")


class Dropped(Exception):
    """A piece that is left out; the message says why."""


def simplify(text: str) -> str:
    """Convert to simplified Chinese, without the rare simplified forms beyond the BMP."""
    text = text.translate(VARIANTS)
    simple = str(OPENCC.convert(text))
    if len(simple) == len(text):
        simple = "".join(a if b > "\uffff" else b for a, b in zip(text, simple, strict=True))
    return simple


def strip_notes(text: str, left: str = "（", right: str = "）") -> str:
    """Remove nested bracketed notes; unbalanced brackets drop the piece."""
    before = None
    while before != text:
        before, text = text, re.sub(f"{left}[^{left}{right}]*{right}", "", text)
    if left in text or right in text:
        raise Dropped("unbalanced note")
    return text


def check_characters(text: str) -> str:
    """Return the text; drop it when lacunae, mojibake, markup or stray ASCII remain."""
    if re.search("[□○●�\ue000-\uf8ff]", text):
        raise Dropped("lacuna or unreadable character")
    if re.search(f"[^{HAN}，。？！；：、…·“”‘’《》（）\n]", text):
        raise Dropped("markup, ASCII or mis-encoded character")
    return text


def clean_title(title: str) -> str:
    """Strip notes from a title; its number in a series becomes ``·其一``."""
    title = simplify(title.split("\t")[0]).translate(PUNCTUATION).replace("/", "·")
    title = strip_notes(strip_notes(title), "〖", "〗").strip(" 。，")
    title = re.sub("[ ·]+其?([一二三四五六七八九十百]+)$", r"·其\1", title)
    title = check_characters(re.sub(" +", "·", title))
    return title if len(title) <= MAX_TITLE else ""


def check_form(body: str) -> str:
    """Lay out verse of five or seven characters in couplets; drop what is nearly regular."""
    clauses = re.findall("([^，。？！；\n]+)([，。？！；]?)[”’》]*", body)
    lengths = [len(re.findall(f"[{HAN}]", clause)) for clause, _ in clauses]
    main, times = Counter(lengths).most_common(1)[0]
    if main not in (5, 7) or times < 0.75 * len(lengths):
        return body
    if times < len(lengths):
        sums = [a + b for a, b in pairwise(lengths)]  # a stray comma
        if main in sums or any(abs(n - main) in (1, main) for n in lengths):
            raise Dropped("broken regular verse")
        return body
    if len(clauses) % 2:
        raise Dropped("odd number of regular lines")
    if re.search("[“”‘’《》：、…]", body):  # speech or titles: keep the layout of the source
        if any(len(re.findall("[，。？！；]", line)) != 2 for line in body.split("\n")):
            raise Dropped("broken regular verse")
        return body
    ends = [mark if mark in ("？", "！") else "，。"[i % 2] for i, (_, mark) in enumerate(clauses)]
    lines = [clause + end for (clause, _), end in zip(clauses, ends, strict=True)]
    return "\n".join(a + b for a, b in zip(lines[::2], lines[1::2], strict=True))


def is_sound(line: str) -> bool:
    """Tell whether one line of a prose book can be cleaned."""
    try:
        check_characters(strip_notes(line).replace(" ", "").replace('"', ""))
    except Dropped:
        return False
    return line.count('"') % 2 == 0


def clean_body(text: str, source: str) -> str:
    """Clean the body of one row of the collection ``source``."""
    text = simplify(text).translate(PUNCTUATION)
    if source in PROSE:  # a bad line is left out, not the whole book
        text = "\n".join(line for line in text.split("\n") if is_sound(line))
    quotes = text.split('"')
    if len(quotes) % 2 == 0:
        raise Dropped("odd number of quotation marks")
    text = "".join(part + "“”"[i % 2] for i, part in enumerate(quotes[:-1])) + quotes[-1]
    text = re.sub(r"\[(\d+|[一二三四五六七八九十]+)\]", "", text)
    if source == "元曲":  # stage directions stay, editorial notes and the cue of the next aria go
        text = re.sub("（[^（）]*(一作|原作|当作|疑作|缺)[^（）]*）", "", text)
        text = re.sub("（[^（）]*唱）。?$", "", text)
        if re.sub("[^（）]", "", text).replace("（）", ""):
            raise Dropped("unbalanced note")
    elif source == "宋词" and "（" in text:
        raise Dropped("lacuna or unreadable character")
    else:
        text = strip_notes(strip_notes(text), "〖", "〗")
    text = re.sub(" *\n *", "\n", text.strip())
    if not re.search("[，。]", text):  # 千字文: one clause a line
        text = re.sub("(.+)\n(.+)", r"\1，\2。", text)
    text = re.sub(" +", "，" if source == "蒙学" else "", text)
    if source == "全唐诗":  # notes may have joined lines
        text = re.sub("([^。\n]。)(?=[^。\n”’》])", r"\1\n", text)
    lines = [re.sub("^[，。；：、]+", "", line) for line in text.split("\n")]
    lines = [re.sub(f"([{HAN}])[，、；]?$", r"\1。", line) for line in lines if line]
    text = re.sub("([，。？！；])[，。；]+", r"\1", check_characters("\n".join(lines)))
    if len(re.findall(f"[{HAN}]", text)) < MIN_HAN:
        raise Dropped("fragment")
    return check_form(text) if source in ("全唐诗", "水墨唐诗") else text
