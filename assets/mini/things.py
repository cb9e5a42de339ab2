"""What the small model (train.py --preset small) knows: emoji by their CLDR names. `--preset full` takes every thing that a set shows."""

# Groups of emojibase that are taken whole, less what looks like another of them.
WHOLE_GROUPS = (3, 4)  # animals and plants, food and drink
LEFT_OUT = """service dog|guide dog|two-hump camel|water buffalo|ox|ewe|ram|mouse|rat|wing|feather|microbe|paw prints|pig nose|spider web|black bird|dodo|
orangutan|cockroach|fly|cricket|worm|rosette|sheaf of rice|wilted flower|empty nest|shamrock|herb|leaf fluttering in wind|chestnut|clinking beer mugs|
clinking glasses|pouring liquid|ice|mate|tumbler glass|baby chick|hatching chick|whale|cow|pig|horse|rabbit|monkey|dragon|tiger|amphora|
fork and knife with plate|kitchen knife|curry rice|fish cake with swirl|dango|oden|moon cake|rice cracker|roasted sweet potato|tamale|flatbread|
stuffed flatbread|cut of meat|butter|beans|leafy green|ginger root|pea pod|custard|shortcake|shaved ice|bowl with spoon|shallow pan of food|
beverage box|cup with straw|teacup without handle|fallen leaf|hyacinth|white flower|coral|seal|boar|badger|chipmunk|moose|donkey|llama|canned food""".replace("\n", "").split("|")

EXTRA = """grinning face|smiling face with heart-eyes|face with tears of joy|winking face|angry face|loudly crying face|sleeping face|thinking face|clown face|
robot|alien|ghost|skull|pile of poo|jack-o-lantern|star-struck|nerd face|cowboy hat face|partying face|Santa Claus|red heart|blue heart|broken heart|brain|eye|
sun|sun with face|full moon face|crescent moon|star|glowing star|cloud|cloud with rain|cloud with lightning|rainbow|fire|droplet|snowflake|snowman|tornado|water wave|umbrella|
ringed planet|comet|house|castle|church|tent|circus tent|ferris wheel|mountain|snow-capped mountain|volcano|desert island|fountain|stadium|
automobile|taxi|police car|racing car|bus|fire engine|ambulance|tractor|delivery truck|bicycle|motorcycle|motor scooter|skateboard|locomotive|tram|
airplane|helicopter|rocket|flying saucer|parachute|sailboat|ship|speedboat|canoe|anchor|satellite|
soccer ball|basketball|baseball|tennis|volleyball|american football|bowling|boxing glove|ice skate|kite|trophy|sports medal|bullseye|game die|
joystick|puzzle piece|teddy bear|balloon|wrapped gift|party popper|Christmas tree|crystal ball|magic wand|pool 8 ball|artist palette|yarn|
top hat|crown|graduation cap|glasses|sunglasses|scarf|t-shirt|jeans|dress|socks|gloves|running shoe|high-heeled shoe|backpack|handbag|ring|gem stone|lipstick|
guitar|violin|trumpet|saxophone|drum|accordion|banjo|microphone|headphone|musical note|radio|bell|camera|television|laptop|desktop computer|mobile phone|telephone|
light bulb|candle|flashlight|magnifying glass tilted left|red paper lantern|open book|closed book|books|newspaper|scroll|envelope|package|pencil|crayon|paintbrush|
scissors|paperclip|pushpin|key|locked|hammer|axe|screwdriver|wrench|gear|magnet|bomb|shield|crossed swords|bow and arrow|ladder|toolbox|
bed|chair|couch and lamp|door|bathtub|toilet|broom|bucket|shopping cart|alarm clock|hourglass done|watch|
microscope|telescope|test tube|pill|syringe|money bag|coin|credit card|briefcase|calendar|trackball|coffin|moai|nazar amulet""".replace("\n", "").split("|")


def small(group_of):
    """The labels of the small model, given each label's emojibase group."""
    return {l for l, g in group_of.items() if (g in WHOLE_GROUPS and l not in LEFT_OUT) or l in EXTRA}
