"""The words of captions: names, motions, scenes, and words that change nothing that is drawn."""

from typing import Final

#: "snow-white" is read as two words: its first one names no scene here.
COLOUR_WORDS: Final[dict[str, str]] = {
    "red": "red crimson scarlet ruby reddish blood-red cherry-red fire-red bright-red",
    "orange": "orange tangerine amber bright-orange",
    "yellow": "yellow golden gold lemon yellowish lemon-yellow sunny-yellow golden-yellow bright-yellow",
    "green": "green emerald lime greenish grass-green leaf-green emerald-green forest-green bright-green",
    "turquoise": "turquoise cyan teal aqua aquamarine",
    "blue": "blue navy azure cobalt sapphire bluish sky-blue navy-blue royal-blue ocean-blue cobalt-blue sea-blue",
    "purple": "purple violet lilac magenta indigo plum",
    "pink": "pink rose salmon hot-pink rosy-pink rose-pink rosy",
    "brown": "brown chocolate chocolate-brown earth-brown brownish",
    "white": "white ivory snow-white snowy-white pure-white",
    "gray": "gray grey silver ash-gray silver-gray stone-gray",
    "black": "black jet-black pitch-black coal-black night-black",
}
KIND_WORDS: Final[dict[str, str]] = {
    "ball": "ball circle sphere disc disk dot bubble balloon",
    "square": "square box block cube",
    "triangle": "triangle pyramid",
    "star": "star starfish five-pointed-star",
    "heart": "heart",
    "ring": "ring donut doughnut hoop",
    "cross": "cross plus plus-sign",
    "diamond": "diamond rhombus gem kite",
    "moon": "moon crescent",
    "fish": "fish goldfish",
    "boat": "boat sailboat ship yacht sailing-boat",
    "sun": "sun",
    "house": "house home hut cottage cabin",
    "tree": "tree fir pine fir-tree pine-tree christmas-tree",
}
SIZE_WORDS: Final[dict[str, str]] = {
    "small": "small little tiny mini",
    "medium": "medium",
    "large": "large big huge giant great",
}
#: Third person, plural and gerund of verbs that a direction follows.
GO: Final = (
    "moves move moving;moves move moving;moves move moving;goes go going;drifts drift drifting;glides glide gliding;"
    "slides slide sliding;travels travel traveling;flies fly flying;floats float floating;swims swim swimming;"
    "rolls roll rolling;sails sail sailing;runs run running;walks walk walking;heads head heading;"
    "slips slip slipping;speeds speed speeding;races race racing;rushes rush rushing;drives drive driving;"
    "wanders wander wandering;cruises cruise cruising;shifts shift shifting;crosses over,cross over,crossing over;"
    "keeps moving,keep moving,moving on;starts to move,start to move,starting to move;is moving,are moving,in motion"
)
DIRECTIONS: Final[dict[str, str]] = {
    "left": "to the left;to the left;left;leftwards;leftward;toward the left;towards the left;from right to left;"
    "from the right to the left;to the left side;from the right side to the left side;across the screen to the left;"
    "left across the screen",
    "right": "to the right;to the right;right;rightwards;rightward;toward the right;towards the right;"
    "from left to right;from the left to the right;to the right side;from the left side to the right side;"
    "across the screen to the right;right across the screen",
    "up": "up;up;upwards;upward;to the top;towards the top;toward the top;from bottom to top;"
    "from the bottom to the top;higher and higher;up to the top;up and up;straight up",
    "down": "down;down;downwards;downward;to the bottom;towards the bottom;toward the bottom;from top to bottom;"
    "from the top to the bottom;lower and lower;down to the bottom;down and down;straight down",
    "circling": "in a circle;in circles;in a circle;around in a circle;around and around;round and round;in a loop;"
    "in loops;in a circular path;along a circle",
}
VERBS: Final[dict[str, str]] = {
    "up": "rises rise rising;rises rise rising;ascends ascend ascending;climbs climb climbing;"
    "lifts off,lift off,lifting off;takes off,take off,taking off;rises up,rise up,rising up;"
    "floats up,float up,floating up;soars soar soaring;rises higher,rise higher,rising higher",
    "down": "falls fall falling;falls fall falling;drops drop dropping;descends descend descending;sinks sink sinking;"
    "falls down,fall down,falling down;comes down,come down,coming down;sinks down,sink down,sinking down;"
    "plunges plunge plunging;lowers lower lowering",
    "circling": "circles circle circling;orbits orbit orbiting;loops loop looping;"
    "circles around,circle around,circling around",
    "bouncing": "bounces bounce bouncing;bounces bounce bouncing;"
    "bounces up and down,bounce up and down,bouncing up and down;"
    "hops hop hopping;hops on the spot,hop on the spot,hopping on the spot;"
    "jumps jump jumping;jumps up and down,jump up and down,jumping up and down;"
    "moves up and down,move up and down,moving up and down",
    "growing": "grows grow growing;grows grow growing;gets bigger,get bigger,getting bigger;"
    "gets larger,get larger,getting larger;expands expand expanding;swells swell swelling;"
    "becomes bigger,become bigger,becoming bigger;grows bigger,grow bigger,growing bigger;"
    "becomes larger,become larger,becoming larger;inflates inflate inflating;"
    "comes closer,come closer,coming closer;keeps growing,keep growing,steadily growing;"
    "gets larger and larger,get larger and larger,getting larger and larger;is growing,are growing,slowly growing;"
    "grows and grows,grow and grow,growing and growing;grows in size,grow in size,growing in size",
    "shrinking": "shrinks shrink shrinking;shrinks shrink shrinking;gets smaller,get smaller,getting smaller;"
    "becomes smaller,become smaller,becoming smaller;gets tinier,get tinier,getting tinier;"
    "contracts contract contracting;grows smaller,grow smaller,growing smaller;"
    "keeps shrinking,keep shrinking,steadily shrinking;"
    "becomes tinier and tinier,become tinier and tinier,becoming tinier and tinier;"
    "is shrinking,are shrinking,slowly shrinking;shrinks and shrinks,shrink and shrink,shrinking and shrinking;"
    "shrinks in size,shrink in size,shrinking in size",
    "spinning": "spins spin spinning;spins spin spinning;rotates rotate rotating;rotates rotate rotating;"
    "turns turn turning;twirls twirl twirling;whirls whirl whirling;revolves revolve revolving;"
    "turns around,turn around,turning around;spins around,spin around,spinning around;"
    "spins in place,spin in place,spinning in place;rotates in place,rotate in place,rotating in place;"
    "turns on the spot,turn on the spot,turning on the spot;turns and turns,turn and turn,turning and turning;"
    "keeps turning,keep turning,steadily turning;"
    "spins and spins,spin and spin,spinning and spinning;is spinning,are spinning,slowly spinning;"
    "rotates around itself,rotate around themselves,rotating slowly;is rotating,are rotating,in rotation",
    "still": "stays still,stay still,staying still;stands still,stand still,standing still;"
    "does not move,do not move,not moving;rests rest resting;sits sit sitting;stays stay staying;stands stand standing;"
    "stays in place,stay in place,staying in place;is motionless,are motionless,motionless;is static,are static,static;"
    "hovers hover hovering;hangs hang hanging;lies lie lying;remains still,remain still,remaining still;"
    "is completely still,are completely still,completely still;just stands there,just stand there,just standing there;"
    "is immobile,are immobile,immobile;stays where it is,stay where they are,staying where it is;"
    "is unmoving,are unmoving,unmoving;remains in place,remain in place,remaining in place;"
    "does nothing,do nothing,doing nothing;is frozen,are frozen,frozen;is at rest,are at rest,at rest",
}
SCENE_WORDS: Final[dict[str, str]] = {
    "sea": "over the sea;on the sea;at sea;in the sea;in the ocean;over the ocean;on the ocean;on the water;over water;"
    "above the waves;on the waves;over blue waves;by the sea;on a lake;over a lake;in the water;at the seaside;"
    "over a calm sea;on a calm blue sea;with the sea in the background;across the sea;across the water",
    "meadow": "on the grass;over the grass;on grass;on green grass;over green grass;in the grass;on a meadow;"
    "in a meadow;over a meadow;on a green meadow;on a green field;in a field;over a field;on a lawn;in a park;"
    "in a garden;over a grassy field;on a grassy hill;across the grass;across a meadow;"
    "over grassland;in a green meadow",
    "snow": "in the snow;on the snow;over the snow;over snow;on a snowy field;in fresh snow;on fresh snow;"
    "through the snow;across the snow;across a snowy field;over a snowy landscape;in a snowy landscape;in winter;"
    "on a winter day;over ice;on ice;through fresh snow;on snow;in a snowy field;over white snow",
    "desert": "in the desert;over the desert;across the desert;on the sand;over sand;on sand;over the sand;"
    "over sand dunes;in a desert;on a sandy plain;across the dunes;over the dunes;in the sand;through the desert",
    "night": "at night;in the night;in the night sky;in a night sky;under the stars;in a starry sky;in space;"
    "in outer space;through space;among the stars;in front of a starry night sky;in a starry night;"
    "under a starry sky;over a starry night sky;in the dark night sky;across the night sky;between the stars;"
    "in front of the stars;on a starry night",
    "sky": "in the sky;in a clear sky;in a blue sky;in the blue sky;in the air;against a blue sky;"
    "in front of a blue sky;in a bright sky;across the sky;through the air;through the sky;up in the sky;"
    "in the clear blue sky",
    "sunset": "at sunset;at dusk;in the evening;in front of a sunset;against a sunset;at dawn;at sunrise;"
    "in a sunset sky;in the sunset;during sunset;over a sunset;in the evening sky;against the evening sky;"
    "in front of a sunset sky",
}
#: Nouns for the same, which `BEHIND` has a place for.
SCENE_NOUNS: Final[dict[str, str]] = {
    "sea": "the sea;the ocean;water;waves;the blue sea;a calm sea;the open sea;blue water",
    "meadow": "grass;the grass;a meadow;a green meadow;a green field;a lawn;green grass;the green field",
    "snow": "snow;the snow;fresh snow;a snowy field;a snowy landscape;a snowy plain;white snow;ice",
    "desert": "sand;the sand;the desert;a desert;sand dunes;the dunes;a sandy desert",
    "night": "a starry sky;the starry sky;the night sky;stars;a dark sky full of stars;the dark night;a sky with stars",
    "sky": "the sky;a blue sky;the blue sky;a clear sky;a bright blue sky;clear air",
    "sunset": "a sunset;the sunset;an evening sky;a sunset sky;the evening sky;a glowing evening sky",
}
BEHIND: Final = (
    "in front of {};with {} behind it;{} behind it;behind it is {};behind it there is only {};behind are {};over {};"
    "above {};across {};against {};{} all over;{} around it;surrounded by {};all around is {};with {} all around;"
    "with {} in the background;{} in the background;the background shows {};the scene is {};there is {} behind;"
    "around it nothing but {};everything else is {};before {};amid {};where there is {};the place is {};{}"
)
PLAIN: Final = (
    "on a {} background;on a {} background;on a plain {} background;over a {} background;against a {} background;"
    "in front of a {} background;with a {} background;{} background;in front of a {} wall;the background is {};"
    "on a {} backdrop;against a {} backdrop;against a {} wall;on {};on a {} canvas;on a solid {} background;"
    "on a flat {} background;over {};against {};over a plain {} background;before a {} background;"
    "behind it plain {};behind it everything is {};all {} behind it;the rest is {};only {} behind it;{} all over;"
    "the backdrop is {};the background is plain {};with {} behind;{} behind it;the whole background is {};"
    "in front of plain {};in front of {};nothing but {} around it;surrounded by {};on a completely {} background;"
    "background color {};the wall behind it is {};a {} background behind it;everything around is {};a {} backdrop"
)
GRADIENT: Final = (
    "on a gradient from {} to {};over a gradient from {} to {};on a {} to {} gradient;on a {} and {} gradient;"
    "on a background that fades from {} to {};with a {} to {} gradient background;in front of a gradient of {} and {};"
    "against a {} to {} gradient;on a gradient background from {} to {};over a {} to {} gradient;"
    "with a background from {} to {};on a {} to {} background;on a background fading from {} to {};"
    "the background goes from {} to {};the background changes from {} to {};{} above and {} below;"
    "the top is {} and the bottom is {};behind it {} turns into {};{} at the top and {} at the bottom;"
    "the background has {} on top and {} at the bottom;with {} above, {} below;from {} down to {}"
)
OPENINGS: Final = (
    "a video of;an animation of;a clip of;an animated clip of;a cartoon of;show me;there is;we see;i want;"
    "a short video of;please draw;a scene with;a movie of;imagine;a picture of;a video showing;a simple animation of;"
    "make;generate;create;film of;an illustration of;watch;look;here is;here we see;can you draw;i would like to see;"
    "this shows;this is;a loop of;in this video;a tiny film with;the video shows;you can see;draw;render;a drawing of"
)
EXTRAS: Final = (
    "slowly;quickly;gently;smoothly;fast;calmly;cinematic;soft light;4k;high quality;minimalist;smooth motion;"
    "flat design;cartoon style;bright colors;beautiful;simple;in the center;close up;steadily;peacefully;detailed;"
    "realistic;colorful;in slow motion;very slowly;cute;nice;happily;wide shot;8k;hd;vector art;nothing else;"
    "and nothing else;that is all;all alone;all the time;again and again;for a while;without a sound;please;loop;"
    "at a steady pace;on its own;in this scene;in the whole picture;style of a cartoon;flat colors;no text"
)
#: Words that may stand before a name or anywhere, and change nothing that is drawn.
ADJECTIVES: Final = (
    "bright;shiny;lovely;pretty;painted;funny;toy;wooden;paper;glowing;old;new;flat;single;lonely;lone;plain;nice;"
    "beautiful;cute;simple;magic;happy;clean;solid;perfect;soft;smooth;round;strange;dark;light;deep;pale;vivid;warm"
)
FILLERS: Final = (
    "just;simply;only;really;slowly;quickly;gently;now;then;there;here;also;always;quite;rather;steadily;quietly;"
    "smoothly;once;somewhere;calmly;all;again;completely;ever;so;as;while;very;too;but;already;together;both;alone;"
    "today;suddenly;softly;happily;lazily;silently;out;on;its;own;itself;like;be;to;by;for;something;thing;object;shape"
)


def vocabulary() -> list[str]:
    """All words that a caption can have, sorted, without the ones that are not words."""
    texts = [
        *(*COLOUR_WORDS.values(), *KIND_WORDS.values(), *SIZE_WORDS.values(), GO, *DIRECTIONS.values()),
        *(*VERBS.values(), *SCENE_WORDS.values(), PLAIN, GRADIENT, OPENINGS, EXTRAS),
        "a an the one two pair of and with both single another other that which is are it they next to beside another",
        *(*SCENE_NOUNS.values(), BEHIND, ADJECTIVES, FILLERS),
        "alongside together while as does do what this these those he she her his their my me your not no yes",
        *(plural_of(word) for words in KIND_WORDS.values() for word in words.split()),
    ]
    text = " ".join(texts)
    for mark in ";,{}-":
        text = text.replace(mark, " ")
    return sorted(set(text.lower().split()))


def plural_of(word: str) -> str:
    """The plural of a kind's name."""
    if word.endswith("fish"):
        return word
    return word + ("es" if word.endswith(("x", "s")) else "s")
