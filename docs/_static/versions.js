// Offers the other versions of the site, which docs/publish.py lists in versions.json beside them.

const root = new URL(document.documentElement.dataset.content_root, location.href);
const page = location.href.slice(root.href.length);

async function offerVersions() {
  const answer = await fetch(new URL("../versions.json", root)).catch(() => null);
  if (!answer?.ok) return; // One version alone, as when it is built on one's own machine.
  const choice = document.getElementById("versions");
  const here = root.pathname.split("/").at(-2);
  for (const version of await answer.json()) {
    choice.add(new Option(version, version, false, version === here));
  }
  choice.addEventListener("change", async () => {
    const other = new URL(`../${choice.value}/`, root);
    const same = await fetch(new URL(page, other), { method: "HEAD" }).catch(() => null);
    location.href = same?.ok ? new URL(page, other).href : other.href;
  });
  choice.parentElement.hidden = false;
}

document.addEventListener("DOMContentLoaded", offerVersions);
