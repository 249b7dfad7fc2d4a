-- How each script for one saga begins: it reads what decides. It replies {-1, version} for a saga that cannot be read.
-- KEYS: saga; of its name: the due times, those that have not ended, the stuck, the ended, the times of expiry
-- ARGV: format, id, what the script says
local key, id = KEYS[1], ARGV[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.pcall('HMGET', key, 'v', 'p', 't', 'o', 'f', 'a', 'c', 'w', 'd', 'b')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return {-1, 0} end
  return found
end

local function number(text)
  return text and #text < 16 and string.find(text, '^%d+$') and tonumber(text)
end
local function digits(value)
  return string.format('%.0f', value)
end

local there = found[1] or redis.call('EXISTS', key) == 1
local version, phase, token, owned = number(found[1]), number(found[2]), found[3], found[4] == '1'
local fingerprint, attempt, crashes, wakes = found[5], number(found[6]), number(found[7]), number(found[8])
local due, created = number(found[9]), number(found[10])
if there then
  if version and version > tonumber(ARGV[1]) then return {-1, version} end
  if not (version and version > 0 and phase and phase > 0 and phase < 5 and token and fingerprint and attempt
      and crashes and wakes and created and (found[4] == '0' or found[4] == '1') and (due or (not found[9] and not owned))) then
    return {-1, 0}
  end
end
local ended = there and phase > 2

-- Set the time from when on anyone may own the saga; nil: never. It begins with what needs no memory: a server whose
-- memory is full refuses a write only to a script that has written nothing.
local function schedule(at)
  due = at
  if at then
    redis.call('ZREM', KEYS[4], id)
    redis.call('HSET', key, 'd', digits(at))
    redis.call('ZADD', KEYS[2], digits(at), id)
  else
    redis.call('HDEL', key, 'd')
    redis.call('ZREM', KEYS[2], id)
    redis.call('ZADD', KEYS[4], digits(created), id)
  end
end

-- Count what came from outside, and make a saga due at once that nobody owns.
local function call()
  redis.call('HINCRBY', key, 'w', 1)
  if not owned then schedule(math.min(due or now, now)) end
end

-- Write entries. ARGV from `first` on: how many, and of each its name, its 'progress order attempt', and its body.
local function record(first)
  for at = first + 1, first + 3 * ARGV[first], 3 do
    local head = redis.call('HGET', key, 'e' .. ARGV[at])
    local began = head and string.match(head, ' (%d+) %d+$') or digits(now)
    redis.call('HSET', key, 'e' .. ARGV[at], ARGV[at + 1] .. ' ' .. began .. ' ' .. digits(now),
      'x' .. ARGV[at], ARGV[at + 2])
  end
end

-- Write phase, result and entries. ARGV from `first` on: phase or '', whether there is a result, result, entries.
local function change(first)
  if ARGV[first] ~= '' then redis.call('HSET', key, 'p', ARGV[first]) end
  if ARGV[first + 1] == '1' then redis.call('HSET', key, 'z', ARGV[first + 2]) end
  record(first + 3)
end
