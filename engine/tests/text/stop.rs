use proptest::prelude::*;
use tidemill_engine::text::StopMatcher;

/// What a reader finds who watches the text grow letter by letter.
fn naive(text: &str, stops: &[String]) -> (String, Option<String>) {
    for end in 0..=text.len() {
        let complete = |stop: &&String| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes());
        // The longest, and the first of equals.
        if let Some(stop) = stops.iter().filter(complete).rev().max_by_key(|stop| stop.len()) {
            return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

/// Pushes the pieces; checks that nothing is held back that could not become a stop string.
fn streamed(pieces: &[String], stops: &[String]) -> (String, Option<String>) {
    let mut matcher = StopMatcher::new(stops);
    let (mut text, mut seen) = (String::new(), String::new());
    for piece in pieces {
        seen += piece;
        let step = matcher.push(piece);
        text += &step.emit;
        if step.matched.is_some() {
            assert_eq!(matcher.push("more").emit, "");
            assert_eq!(matcher.finish(), "");
            return (text, step.matched);
        }
        let held = seen.strip_prefix(text.as_str()).unwrap();
        assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)), "held back {held:?}");
    }
    text += &matcher.finish();
    (text, None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_cutting_gives_what_the_whole_text_gives(
        pieces in prop::collection::vec("[abé中]{0,4}", 0..12),
        stops in prop::collection::vec("[abé中]{0,5}", 0..4),
    ) {
        prop_assert_eq!(streamed(&pieces, &stops), naive(&pieces.concat(), &stops));
    }
}

fn run(pieces: &[&str], stops: &[&str]) -> (String, Option<String>) {
    let own = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    streamed(&own(pieces), &own(stops))
}

#[test]
fn a_stop_string_across_pieces_is_cut_out() {
    assert_eq!(
        run(&["Hello\n", "\nUs", "er: x"], &["\n\nUser:"]),
        ("Hello".to_owned(), Some("\n\nUser:".to_owned()))
    );
}

#[test]
fn what_only_looked_like_a_stop_string_is_given_back() {
    assert_eq!(run(&["a\n", "\nUs", "ual"], &["\n\nUser:"]), ("a\n\nUsual".to_owned(), None));
    assert_eq!(run(&["aab", "aab"], &["aabaac"]), ("aabaab".to_owned(), None));
}

#[test]
fn the_first_complete_string_wins_and_of_equals_the_longest() {
    assert_eq!(run(&["xabcd"], &["abcd", "bc"]), ("xa".to_owned(), Some("bc".to_owned())));
    assert_eq!(run(&["xabc"], &["bc", "abc", "c"]), ("x".to_owned(), Some("abc".to_owned())));
}

#[test]
fn long_hostile_stop_strings_cost_linear_time() {
    let stops: Vec<String> = (0..16).map(|i| "a".repeat(20_000 + i) + "b").collect();
    let mut matcher = StopMatcher::new(&stops);
    let start = std::time::Instant::now();
    let mut emitted = 0;
    for _ in 0..100_000 {
        emitted += matcher.push("a").emit.len();
    }
    assert_eq!(emitted + matcher.finish().len(), 100_000);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
