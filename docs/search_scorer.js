// Puts the page with all messages first where a sentence is looked for; the rest are Sphinx's own scores.

const FEWEST_WORDS = 4;

var Scorer = {
  score: ([page, , , , score]) => {
    const words = new URLSearchParams(location.search).get("q")?.trim().split(/\s+/) ?? [];
    return page === "troubleshooting" && words.length >= FEWEST_WORDS ? score + 1000 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
