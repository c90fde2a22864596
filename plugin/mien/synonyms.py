"""Everyday words for what the vectors mean: whoever looks for "grumpy" shall find anger.

They belong to the names that mien's own data gives to its vectors (`data/`), whatever the pack. A name with
a minus is the negative pole. Words that the poles in a manifest already have need not be here.
"""

from __future__ import annotations

WORDS = {
    # emotions
    "joy": "happy happiness cheerful glad delighted delight elated ecstatic merry jolly excited thrilled fun",
    "sadness": "unhappy sorrow sorrowful depressed depression gloomy melancholy miserable grief down blue",
    "anger": "mad furious rage grumpy irritated annoyed outraged hostile cross hate hateful fury",
    "fear": "scared frightened terrified terror panic horror anxious anxiety dread nervous worried",
    "disgust": "revolted repulsed grossed nauseated gross yuck sickened",
    "surprise": "astonished amazed shocked startled stunned astonishment",
    "calm": "relaxed peaceful serene tranquil quiet zen chill composed",
    "trust": "confident faith reliance believing",
    "anticipation": "eager expectant hopeful hope looking-forward curious expectation",
    "love": "affectionate affection romantic adoring tender fond caring",
    # the Big Five
    "openness": "creative creativity inventive artistic open-minded",
    "-openness": "closed-minded narrow-minded unimaginative",
    "conscientiousness": "disciplined responsible hard-working reliable thorough tidy",
    "-conscientiousness": "lazy sloppy messy unreliable chaotic",
    "extraversion": "extrovert extroverted extravert outgoing gregarious",
    "-extraversion": "introvert introverted introversion",
    "agreeableness": "nice friendly polite helpful empathetic compassionate",
    "-agreeableness": "mean rude nasty unkind grumpy disagreeable argumentative hostile",
    "neuroticism": "nervous insecure stressed unstable neurotic",
    "-neuroticism": "stable resilient stoic",
    # the sixteen factors
    "warmth": "friendly kind welcoming",
    "-warmth": "cold aloof distant",
    "reasoning": "smart intelligent clever logical",
    "-reasoning": "dumb stupid simple",
    "emotional_stability": "stable balanced mature",
    "-emotional_stability": "unstable volatile emotional moody",
    "dominance": "bossy commanding authoritative pushy",
    "-dominance": "submissive humble obedient meek",
    "liveliness": "playful energetic enthusiastic bubbly funny silly",
    "-liveliness": "sober solemn grave dull",
    "rule_consciousness": "obedient lawful strict moral",
    "-rule_consciousness": "rebellious rebel disobedient",
    "social_boldness": "brave daring fearless adventurous confident",
    "-social_boldness": "shyness bashful awkward",
    "sensitivity": "sensitive sentimental poetic soft",
    "-sensitivity": "tough hard rational",
    "vigilance": "paranoid distrustful wary mistrustful",
    "-vigilance": "naive gullible",
    "abstractedness": "dreamer daydreaming philosophical",
    "-abstractedness": "realistic pragmatic down-to-earth",
    "privateness": "secretive reserved private",
    "-privateness": "honest candid open frank",
    "apprehension": "guilty guilt insecure",
    "-apprehension": "confident self-confident",
    "openness_to_change": "progressive liberal innovative",
    "-openness_to_change": "conservative old-fashioned",
    "self_reliance": "independent lonely loner",
    "-self_reliance": "dependent team-player",
    "perfectionism": "perfectionist meticulous precise picky",
    "-perfectionism": "easygoing laid-back",
    "tension": "tense stressed restless",
    "-tension": "chill easygoing laid-back",
    # the dark triad
    "machiavellianism": "manipulator scheming devious cunning sly evil",
    "-machiavellianism": "honest genuine",
    "narcissism": "arrogant vain egotistical selfish conceited boastful proud",
    "-narcissism": "humble modesty",
    "psychopathy": "cruel ruthless heartless evil cold-blooded",
    "-psychopathy": "empathetic kind",
    # valence, arousal, control
    "valence": "positive optimistic upbeat",
    "-valence": "negative pessimistic bitter grumpy",
    "arousal": "excited energetic hyper awake",
    "-arousal": "tired bored boring lazy",
    "control": "confident strong",
    "-control": "weak helpless",
    # simulated users
    "skepticism": "sceptical skeptical sceptic doubt doubting critical",
    "-skepticism": "gullible naive",
    "confusion": "confused bewildered puzzled lost",
    "impatience": "impatient hasty rushed",
    "-impatience": "patient patience",
    "incoherence": "incoherent rambling crazy insane",
    "-incoherence": "coherent clear",
    # registers
    "formal": "professional polite official business",
    "-formal": "informal relaxed colloquial slang",
    "verbose": "long wordy detailed talkative chatty",
    "-verbose": "short brief concise laconic",
    "warm": "friendly kind loving",
    "-warm": "cold unfriendly robotic",
    "blunt": "honest harsh frank sarcastic rude brusque",
    "-blunt": "polite gentle evasive",
}
_MEANT = {name: frozenset(words.split()) for name, words in WORDS.items()}


def meant_by(word: str) -> list[str]:
    """The vectors, a minus before those of which it is the negative pole, that `word` stands for."""
    return [name for name, words in _MEANT.items() if word.casefold() in words]
